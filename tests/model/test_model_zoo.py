"""Every option of the group: its size on paper, a training step, and its exports."""

import shutil

import pytest
import torch
from torch import nn
from zoo import OPTIONS, build, count, enliven, quick_and_slow

from cvtrain.export import Onnx, OpenVINO, TorchExport, TorchScript

PARAMETERS = {
    "alexnet": (62_378_344, 224),
    "convnext_tiny": (28_589_128, 224),
    "efficientnet_b0": (5_288_548, 224),
    "efficientnet_b1": (7_794_184, 240),
    "efficientnet_b2": (9_109_994, 260),
    "efficientnet_b3": (12_233_232, 300),
    "efficientnet_b4": (19_341_616, 380),
    "efficientnet_b5": (30_389_784, 456),
    "efficientnet_b6": (43_040_704, 528),
    "efficientnet_b7": (66_347_960, 600),
    "googlenet": (6_624_904, 224),
    "inception_v3": (23_834_568, 299),
    "mobilenet_v1": (4_231_976, 224),
    "mobilenet_v2": (3_504_872, 224),
    "mobilenet_v3_large": (5_483_032, 224),
    "mobilenet_v3_small": (2_542_856, 224),
    "resnet18": (11_689_512, 224),
    "resnet34": (21_797_672, 224),
    "resnet50": (25_557_032, 224),
    "resnext50_32x4d": (25_028_904, 224),
    "vgg16": (138_357_544, 224),
    "vit_b_16": (86_567_656, 224),
}
"""At 1000 classes, and the side in pixels that the network was designed for; both as published.

Inception v3 without its auxiliary classifier, of 3,326,696 parameters.
"""
FREE = ("lenet5", "simple_cnn", "timm", "torchvision")
"""Options whose size depends on the picture or on a name."""
SAME = ("resnet34", "timm", "torchvision", *(f"efficientnet_b{i}" for i in range(1, 8)))
"""The blocks of resnet18 and efficientnet_b0 again, and two names for what is exported under others."""
OTHER_FORMATS = ("lenet5", "mobilenet_v3_small", "resnet18", "simple_cnn")
"""Exported in every format; the others cost minutes, and their ONNX files are made of the same graphs."""

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_option_is_held_to_a_number_or_is_of_no_fixed_size():
    assert sorted([*PARAMETERS, *FREE]) == OPTIONS
    assert len(OPTIONS) == 26


@pytest.mark.parametrize(
    "option", quick_and_slow(PARAMETERS, ("alexnet", "mobilenet_v1", "resnext50_32x4d", "vgg16", "vit_b_16"))
)
def test_a_network_at_1000_classes_has_the_published_number_of_parameters(option):
    parameters, side = PARAMETERS[option]
    with torch.device("meta"):
        assert count(build(option, 1000, 3, side)) == parameters


def test_alexnet_is_the_same_at_224_and_227_px():
    with torch.device("meta"):
        for side in (224, 227):
            model = build("alexnet", 1000, 3, side)
            assert count(model) == 62_378_344
            before_pool = model.features[:-2](torch.empty(1, 3, side, side))
            assert before_pool.shape == (1, 256, 6, 6)  # so that nothing is averaged


def test_alexnets_response_norm_is_the_papers_sum_over_five_channels():
    with torch.device("meta"):
        norm = build("alexnet", 2, 3, 224).features[2]
    maps = torch.rand(1, 7, 2, 2) * 30
    squares = torch.cat([torch.zeros(1, 2, 2, 2), maps**2, torch.zeros(1, 2, 2, 2)], dim=1)
    sums = torch.stack([squares[:, i : i + 5].sum(1) for i in range(7)], dim=1)
    assert torch.allclose(norm(maps), maps / (2 + 1e-4 * sums) ** 0.75, rtol=1e-5)


def test_mobilenet_v1_halves_the_picture_where_the_paper_does():
    with torch.device("meta"):
        model = build("mobilenet_v1", 1000, 3, 224)
        maps = torch.empty(1, 3, 224, 224)
        seen = [tuple((maps := layer(maps)).shape[1:3]) for layer in model.features[:-2]]
    assert seen == [
        *((32, 112), (64, 112), (128, 56), (128, 56), (256, 28), (256, 28)),
        *([(512, 14)] * 6),
        *((1024, 7), (1024, 7)),
    ]
    assert model.features[1][0][0].groups == 32


def test_the_inception_networks_have_one_output_while_they_train():
    with torch.device("meta"):
        for option in ("googlenet", "inception_v3"):
            logits = build(option, 5, 3, 64).train()(torch.empty(2, 3, 64, 64))
            assert logits.shape == (2, 5)


@pytest.mark.parametrize("option", quick_and_slow(OPTIONS, ("lenet5", "simple_cnn", "mobilenet_v1")))
def test_a_network_takes_a_training_step_that_reaches_every_parameter(option):
    torch.manual_seed(0)
    images, labels = torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 2, 0])
    model = build(option, 3, 1, 32).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    optimizer.step()
    assert torch.isfinite(loss)
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("option", [option for option in OPTIONS if option not in SAME])
def test_the_exports_of_a_network_are_valid_and_give_its_logits_at_any_batch_size(option, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, example = enliven(build(option, 3, 3, 32), torch.randn(16, 3, 32, 32)), torch.randn(1, 3, 32, 32)
    made = Onnx().export(model, example, tmp_path, {})  # each raises where its file is off
    assert made.note == ""
    assert made.path.stat().st_size > 3.9 * count(model)
    if option in OTHER_FORMATS:
        monkeypatch.setattr("cvtrain.export.openvino.write_onnx", lambda _, path: shutil.copy(made.path, path))
        for exporter in (OpenVINO, TorchExport, TorchScript):
            exporter().export(model, example, tmp_path, {})
