"""Which channels hang together: removing some must do to the logits what silencing them does."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch import nn

from cvtrain.compression import channels
from cvtrain.compression.channels import Cut, channel_groups, check_removal, in_blocks, remove_channels
from cvtrain.errors import ConfigError
from cvtrain.model import LeNet5, MobileNetV1, SimpleCNN, torchvision_model
from cvtrain.model.head import put_mlp_head
from cvtrain.regularizer import StochasticDepth

pytestmark = pytest.mark.usefixtures("one_thread")


def unsettled(model, seed=0):
    """Batch norm as after training, so that nothing cancels out by chance."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight.data, 0.5), (module.bias.data, -0.5), (module.running_mean, -0.5)):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model.eval()


def some_of(group, generator):
    width = group.channels // group.blocks
    return in_blocks(group, torch.randperm(width, generator=generator)[: width // 3].sort().values)


def silence(model, groups, doomed):
    """Zero what makes and carries the channels; whatever reads them reads zeros."""
    tensors = dict(model.named_parameters())
    for group, gone in zip(groups, doomed, strict=True):
        for cut in group.cuts:
            if cut.dim == 0 and cut.tensor in tensors:
                tensors[cut.tensor].data[cut.places[torch.isin(cut.channels, gone)]] = 0


def compare(model, example, tolerance=2e-4):
    groups = channel_groups(model, example)
    generator = torch.Generator().manual_seed(1)
    doomed = [some_of(group, generator) for group in groups]
    removed, silenced = copy.deepcopy(model), copy.deepcopy(model)
    remove_channels(removed, groups, doomed)
    silence(silenced, groups, doomed)
    images = torch.randn((3, *example.shape[1:]), generator=generator)
    with torch.no_grad():
        before, after, expected = model(images), removed(images), silenced(images)
    assert (before - expected).abs().max() > 1e-3 * before.abs().max()  # the channels do matter
    torch.testing.assert_close(after, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    return groups, removed


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.middle = nn.Conv2d(24, 48, 3, padding=1, groups=4)
        self.end = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48 * 4, 3))

    def forward(self, images):
        return self.end(self.middle(self.stem(images)))


def dense_net():
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=12, block_config=(2, 2), num_init_features=24, bn_size=2, num_classes=5)


QUICK = {
    "simple_cnn": (lambda: SimpleCNN(5, 1, 16, (16, 24, 32)), (1, 16, 16)),
    "lenet5": (lambda: LeNet5(5, 1, 28), (1, 28, 28)),
    "grouped": (Grouped, (1, 16, 16)),
    "dense_net": (dense_net, (3, 32, 32)),
    "resnet18": (lambda: torchvision_model(5, 3, 32, "resnet18"), (3, 32, 32)),
}
SLOW = {
    "mobilenet_v1": (lambda: MobileNetV1(5, 3, 32), (3, 32, 32)),
    **{
        name: (functools.partial(torchvision_model, 5, 3, side, name), (3, side, side))
        for name, side in (
            *(("mobilenet_v3_small", 32), ("googlenet", 64), ("efficientnet_b0", 64), ("mobilenet_v2", 64)),
            *(("vgg11_bn", 64), ("regnet_y_400mf", 64), ("squeezenet1_1", 64)),
        )
    },
}


@pytest.mark.parametrize("name", QUICK)
def test_removed_channels_do_to_the_logits_what_silent_ones_do(name):
    make, shape = QUICK[name]
    torch.manual_seed(0)
    compare(unsettled(make()), torch.zeros(1, *shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_removed_channels_do_what_silent_ones_do_in_every_family(name):
    make, shape = SLOW[name]
    torch.manual_seed(0)
    compare(unsettled(make()), torch.zeros(1, *shape))


@pytest.mark.slow
def test_convnext_loses_channels_of_its_norms_and_layer_scales_too():
    torch.manual_seed(0)
    model = torchvision_model(5, 3, 64, "convnext_tiny").eval()
    groups = channel_groups(model, torch.zeros(1, 3, 64, 64))
    assert any(cut.tensor.endswith("layer_scale") for group in groups for cut in group.cuts)
    check_removal(model, groups, 8, torch.zeros(1, 3, 64, 64))


def test_every_layer_but_the_classifier_may_lose_outputs():
    model = torchvision_model(5, 3, 32, "resnet18").eval()
    groups = channel_groups(model, torch.zeros(1, 3, 32, 32))
    made = {cut.tensor for group in groups for cut in group.cuts if cut.dim == 0}
    weights = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert weights <= made
    assert "fc.weight" not in made
    assert "fc.bias" not in made


def test_the_hidden_units_of_an_mlp_head_may_go_and_its_logits_stay():
    torch.manual_seed(0)
    model = SimpleCNN(5, 1, 16, (16, 24, 32))
    put_mlp_head(model, (1, 16, 16))
    _, removed = compare(model.eval(), torch.zeros(1, 1, 16, 16))
    assert len(removed.head[1].weight) < 512
    assert len(removed.head[4].weight) == 5


def test_stochastic_depth_and_frozen_layers_change_nothing():
    torch.manual_seed(0)
    model = unsettled(torchvision_model(5, 3, 32, "resnet18"))
    plain = channel_groups(model, torch.zeros(1, 3, 32, 32))
    StochasticDepth(0.2).attach(model, (3, 32, 32))
    model.conv1.requires_grad_(False)
    found = channel_groups(model, torch.zeros(1, 3, 32, 32))
    assert [(g.layer, g.channels, len(g.cuts)) for g in found] == [(g.layer, g.channels, len(g.cuts)) for g in plain]
    remove_channels(model, found, [torch.arange(8)] * len(found))
    assert not model.conv1.weight.requires_grad
    assert model.bn1.weight.requires_grad
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


def test_each_block_of_a_grouped_convolution_loses_as_many_channels():
    groups = channel_groups(Grouped().eval(), torch.zeros(1, 1, 16, 16))
    assert {(group.layer, group.channels, group.blocks) for group in groups} == {("middle", 48, 4), ("stem.0", 24, 4)}
    torch.testing.assert_close(in_blocks(groups[0], torch.tensor([0, 5])), torch.tensor([0, 5, 12, 17, 24, 29, 36, 41]))


def vision_transformer():
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)


def swin():
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5)


def shuffle_net():
    from torchvision.models import ShuffleNetV2

    return ShuffleNetV2([1, 1, 1], [24, 48, 96, 192, 256], num_classes=5)


@pytest.mark.parametrize("make", [vision_transformer, swin, shuffle_net])
def test_a_network_whose_channels_cannot_go_is_refused_with_its_kind_and_a_way_out(make):
    model, example = make().eval(), torch.zeros(1, 3, 32, 32)
    with pytest.raises(ConfigError) as caught:
        check_removal(model, channel_groups(model, example), 8, example)
    message = str(caught.value)
    assert type(model).__name__ in message
    assert "compression=prune_structured" in message
    assert "resnet18" in message
    assert message.count("\n") <= 2


def test_an_analysis_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr(channels, "PATIENCE_S", 0.001)
    with pytest.raises(ConfigError, match="did not end within"):
        channel_groups(LeNet5(5, 1, 28).eval(), torch.zeros(1, 1, 28, 28))


def test_an_analysis_that_is_wrong_about_a_layers_size_is_found_out():
    model, example = LeNet5(5, 1, 28).eval(), torch.zeros(1, 1, 28, 28)
    wrong = Cut("features.0.weight", 0, torch.arange(120) + 100, torch.arange(120))
    groups = [dataclasses.replace(group, cuts=(*group.cuts, wrong)) for group in channel_groups(model, example)]
    with pytest.raises(ConfigError, match="with fewer channels it does not run"):
        check_removal(model, groups, 2, example)


def test_a_model_of_one_layer_has_nothing_to_lose():
    with pytest.raises(ConfigError, match="no layer between input and logits"):
        channel_groups(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval(), torch.zeros(1, 1, 8, 8))
