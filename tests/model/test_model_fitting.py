"""Networks of libraries fitted to channels, to small pictures, to short runs; and what no size or name fits."""

import logging
import re
import sys

import pytest
import torch
from real_formats import write_folder
from torch import nn
from zoo import build

from cvtrain.build import Builder, build_model
from cvtrain.compose import Composer
from cvtrain.errors import ConfigError
from cvtrain.model import timm_model, torchvision_model
from cvtrain.model.size import refusal, sized

pytestmark = pytest.mark.usefixtures("one_thread")


def timm_or_skip():
    return pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("option", "name", "asked", "smallest"),
    [
        pytest.param("vgg16", "vgg11", 31, 32, marks=pytest.mark.slow),
        ("torchvision", "squeezenet1_1", 3, 4),
        pytest.param("inception_v3", "inception_v3", 8, 19, marks=pytest.mark.slow),
        pytest.param("vit_b_16", "vit_b_16", 8, 16, marks=pytest.mark.slow),
    ],
)
def test_the_error_names_the_smallest_size_that_a_network_takes(option, name, asked, smallest):
    with pytest.raises(ConfigError) as refused:
        build(option, 2, 3, asked, name=name)
    text = str(refused.value)
    assert f"model.name={name} does not take pictures of {asked} px; the smallest it takes are {smallest} px." in text
    assert f"Set img_size={smallest}," in text
    assert text.count("\n") <= 2
    for side in range(max(1, smallest - 3), smallest):
        with torch.device("meta"), pytest.raises(ConfigError):
            build(option, 2, 3, side, name=name)
    with torch.device("meta"):
        build(option, 2, 3, smallest, name=name)


def test_a_size_between_the_patches_is_answered_with_the_next_one():
    with torch.device("meta"), pytest.raises(ConfigError, match=r"(?s)30 px; the smallest .* 16 px.*Set img_size=32,"):
        build("vit_b_16", 2, 3, 30)


def test_an_own_network_says_its_smallest_size_too():
    with pytest.raises(ConfigError, match=r"(?s)model AlexNet does not take pictures of 6 px; the smallest .* 7 px"):
        build("alexnet", 2, 3, 6)


class Picky(nn.Module):
    """Looks at the content of what it gets, so that only real pictures can be tried."""

    def __init__(self, side):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AvgPool2d(4, 3), nn.Flatten(), nn.LazyLinear(2))

    def forward(self, images):
        return self.layers(images) if float(images.sum()) < 1e9 else images


def test_a_plugin_that_needs_real_pictures_says_its_smallest_size():
    with pytest.raises(
        ConfigError, match=r"(?s)model mine does not take pictures of 5 px; the smallest it takes are 6"
    ):
        sized(Picky, 3, 5, "model mine")
    assert isinstance(sized(Picky, 3, 6, "model mine"), Picky)


def test_a_network_that_takes_no_size_at_all_is_left_to_the_first_batch():
    class Elsewhere(nn.Module):
        def forward(self, images):
            raise RuntimeError("needs another device")

    assert isinstance(sized(lambda side: Elsewhere(), 3, 8, "model mine"), Elsewhere)


def test_what_a_network_says_of_its_own_settings_is_not_taken_for_a_matter_of_size():
    with pytest.raises(ConfigError, match=r"model\.name=resnet81 is not a torchvision classifier"):
        build("torchvision", 2, 3, 8, name="resnet81")
    with pytest.raises(ConfigError, match=r"model: .*SimpleCNN refuses its settings"):
        build("simple_cnn", 2, 3, 8, widths=3)


def test_trying_leaves_modes_and_statistics_as_they_were():
    model = torchvision_model(2, 3, 32, "resnet18").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.layer1.eval()
    assert refusal(model, (3, 32, 32)) is None
    assert model.training and not model.layer1.training and not model.layer1[0].bn1.training and model.layer2.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert refusal(model, (4, 32, 32)) is not None


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("option", ["alexnet", "mobilenet_v1", "mobilenet_v3_small", "convnext_tiny"])
def test_a_network_takes_any_number_of_channels(option, channels):
    with torch.device("meta"):
        model = build(option, 4, channels, 64)
        assert model(torch.empty(2, channels, 64, 64)).shape == (2, 4)


@pytest.mark.parametrize("option", ["alexnet", "mobilenet_v1", "googlenet", "inception_v3", "efficientnet_b0"])
def test_up_to_64_px_the_stem_keeps_the_size_of_the_picture(option):
    with torch.device("meta"):
        small, large = build(option, 2, 3, 64), build(option, 2, 3, 80)
    first = [next(m for m in model.modules() if isinstance(m, nn.Conv2d)) for model in (small, large)]
    assert (first[0].kernel_size, first[0].stride, first[0].padding) == ((3, 3), (1, 1), (1, 1))
    assert first[1].stride[0] > 1
    pools = [sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) for model in (small, large)]
    assert pools[1] - pools[0] == (option in ("alexnet", "googlenet", "inception_v3"))


@pytest.mark.parametrize("name", ["resnet10t", "tf_mobilenetv3_small_minimal_100", "mobilenetv2_035"])
def test_a_timm_network_gets_the_same_small_stem(name, caplog):
    timm_or_skip()
    caplog.set_level(logging.INFO, logger="cvtrain")
    with torch.device("meta"):
        model = timm_model(3, 1, 32, name)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert (first.in_channels, first.kernel_size, first.stride) == (1, (3, 3), (1, 1))
    assert not any(isinstance(m, nn.MaxPool2d) for m in model.modules())
    with torch.device("meta"):
        assert first(torch.empty(1, 1, 32, 32)).shape[-1] == 32
        assert model(torch.empty(2, 1, 32, 32)).shape == (2, 3)
    without = " without max-pool" if name == "resnet10t" else ""
    assert caplog.messages == [
        "model: first convolution takes 1 channel",
        f"model: 3×3 stem of stride 1{without}, for small pictures",
    ]
    momenta = {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert min(momenta) >= 0.1
    with torch.device("meta"):
        large = timm_model(3, 3, 65, name)
    assert next(m for m in large.modules() if isinstance(m, nn.Conv2d)).stride == (2, 2)


def test_a_stem_that_the_rest_of_the_network_depends_on_stays(caplog):
    timm_or_skip()
    caplog.set_level(logging.INFO, logger="cvtrain")
    model = timm_model(2, 3, 64, "levit_128s")
    assert caplog.messages == ["model: stem left as it is; the rest of the network is made for what it gives"]
    assert next(m for m in model.modules() if isinstance(m, nn.Conv2d)).stride == (2, 2)
    assert refusal(model, (3, 64, 64)) is None


def test_a_timm_transformer_is_made_for_the_size():
    timm_or_skip()
    with torch.device("meta"):
        model = timm_model(2, 1, 32, "vit_tiny_patch16_224")
    assert model.pos_embed.shape == (1, 1 + 4, 192)


@pytest.mark.slow
def test_a_timm_transformer_says_its_smallest_size():
    timm_or_skip()
    with pytest.raises(ConfigError, match=r"(?s)does not take pictures of 8 px; the smallest it takes are 16 px"):
        build("timm", 2, 1, 8, name="vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet10", r"is not a timm classifier; did you mean .*resnet10t"),
        ("resnet18.a9", r"timm has no such weights; did you mean .*resnet18\.a1_in1k"),
        ("hf-hub:someone/theirs", "is not a timm classifier"),
        ("local-dir:/tmp", "is not a timm classifier"),
    ],
)
def test_a_name_that_timm_does_not_know_is_refused(name, words):
    timm_or_skip()
    with pytest.raises(ConfigError, match=rf"model\.name={re.escape(name)}.*{words}"):
        timm_model(2, 3, 32, name)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"(?s)model=timm .* needs the package timm.*pip install 'cvtrain\[timm\]'"):
        build("timm", 2, 3, 32)


def side_of(*overrides):
    config = Composer("train", None).check([*overrides, "workers=0"], [])[1]
    return Builder(config, []).data()[0].preprocess.img_size


@pytest.mark.slow
def test_the_size_that_a_network_was_designed_for_is_for_pictures_without_a_size_of_their_own(tmp_path):
    write_folder(tmp_path)
    files = ["data=folder", f"data.root={tmp_path}"]
    assert side_of("model=efficientnet_b1", *files) == 240
    assert side_of("model=efficientnet_b1", *files, "img_size=48") == 48
    assert side_of("model=resnet18", *files) == 224
    assert side_of("model=efficientnet_b1") == 8
    assert side_of("model=lenet5") == 28


def test_sizes_in_a_models_node_are_not_passed_to_a_class_that_takes_none():
    node = {"_target_": "cvtrain.model.SimpleCNN", "img_size": 28, "native_size": 32}
    assert isinstance(build_model(Builder({}, []), node, 2, 1, 8), nn.Module)
