"""Networks: sizes known from the papers, stems fitted to the data, errors that name the fix."""

import logging

import pytest
import torch
from torch import nn

from cvtrain.errors import ConfigError
from cvtrain.model import LeNet5, SimpleCNN, torchvision_model

pytestmark = pytest.mark.usefixtures("one_thread")


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_lenet_has_44426_parameters():
    model = LeNet5(10, 1, 28)
    assert count(model) == 44_426
    assert [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Conv2d)] == [(6, 1, 5, 5), (16, 6, 5, 5)]
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [120, 84, 10]


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032)]
)
def test_a_residual_network_at_224_px_has_the_papers_number_of_parameters(name, parameters):
    model = torchvision_model(1000, 3, 224, name)
    assert count(model) == parameters
    assert (model.conv1.kernel_size, model.conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(model.maxpool, nn.MaxPool2d)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("img_size", [8, 32, 64])
def test_up_to_64_px_the_stem_is_3x3_of_stride_1_without_a_pool(channels, img_size):
    model = torchvision_model(7, channels, img_size, "resnet18")
    stem = model.conv1
    assert (stem.in_channels, stem.out_channels) == (channels, 64)
    assert (stem.kernel_size, stem.stride, stem.padding, stem.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert isinstance(model.maxpool, nn.Identity)
    assert count(model) == 11_689_512 - 64 * 3 * 49 - 512 * 1000 - 1000 + 64 * channels * 9 + 512 * 7 + 7
    assert model.eval()(torch.randn(2, channels, img_size, img_size)).shape == (2, 7)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_above_64_px_only_the_channels_of_the_stem_change(channels):
    model = torchvision_model(7, channels, 65, "resnet18")
    assert (model.conv1.in_channels, model.conv1.kernel_size, model.conv1.stride) == (channels, (7, 7), (2, 2))
    assert isinstance(model.maxpool, nn.MaxPool2d)


@pytest.mark.parametrize(("small_stem", "img_size", "side"), [(True, 224, 3), (False, 32, 7)])
def test_the_stem_can_be_asked_for_or_refused(small_stem, img_size, side):
    assert torchvision_model(2, 3, img_size, "resnet18", small_stem=small_stem).conv1.kernel_size == (side, side)


def test_what_was_changed_is_told_in_the_log(caplog):
    caplog.set_level(logging.INFO, logger="cvtrain")
    torchvision_model(2, 1, 28, "resnet18")
    assert caplog.messages == [
        "model: first convolution takes 1 channel",
        "model: 3×3 stem of stride 1 without max-pool, for small pictures",
    ]
    caplog.clear()
    torchvision_model(2, 3, 224, "resnet18")
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0", "densenet121", "convnext_tiny"])
def test_other_families_take_small_pictures_of_one_channel(name):
    model = torchvision_model(4, 1, 32, name)
    assert model.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 4)
    momenta = {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(momentum >= 0.1 for momentum in momenta)


def test_a_patch_embedding_keeps_its_stride():
    model = torchvision_model(4, 3, 32, "convnext_tiny")
    assert (model.features[0][0].kernel_size, model.features[0][0].stride) == ((4, 4), (4, 4))


def test_an_unknown_name_suggests_the_nearest_ones():
    with pytest.raises(
        ConfigError, match=r"model\.name=resnet81 is not a torchvision classifier; did you mean .*'resnet18'"
    ):
        torchvision_model(10, 3, 32, "resnet81")


def test_lenet_refuses_pictures_under_16_px_and_takes_16():
    with pytest.raises(ConfigError, match=r"at least 16 px, not img_size=15"):
        LeNet5(10, 1, 15)
    assert LeNet5(10, 3, 16)(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_simple_cnn_fits_every_size_and_keeps_its_head_small():
    for img_size in [*range(1, 40), 63, 64, 100, 224]:
        model = SimpleCNN(3, 2, img_size, widths=(4, 4, 8)).eval()
        assert model(torch.randn(1, 2, img_size, img_size)).shape == (1, 3)
        side = round((model.head.in_features / 8) ** 0.5)
        assert side <= 7
        assert side == img_size if img_size < 4 else side >= 4
