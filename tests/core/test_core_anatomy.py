"""Residual branches, stems, convolutions, norms and classifiers found by looking at the network."""

import pytest
import torch
from torch import nn
from torchvision import models

from cvtrain.core.anatomy import (
    classifier,
    first_convolution,
    norm_layers,
    replace_module,
    residual_branches,
    stem_pool,
)
from cvtrain.errors import ConfigError
from cvtrain.model import LeNet5, SimpleCNN


@pytest.mark.parametrize(
    ("name", "count", "end"),
    [
        ("resnet18", 8, ".bn2"),
        pytest.param("resnet34", 16, ".bn2", marks=pytest.mark.slow),
        pytest.param("resnet50", 16, ".bn3", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", 10, ".conv", marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", 9, ".stochastic_depth", marks=pytest.mark.slow),
    ],
)
def test_every_residual_branch_of_a_torchvision_network_is_found_in_order(name, count, end):
    with torch.device("meta"):
        model = models.get_model(name, weights=None)
    ends = residual_branches(model)
    assert len(ends) == len(set(ends)) == count
    order = [path for path, _ in model.named_modules()]
    assert sorted(ends, key=order.index) == ends
    assert all(path.endswith(end) for path in ends)


@pytest.mark.parametrize(
    "make", [lambda: LeNet5(10, 1, 28), lambda: SimpleCNN(10, 1, 8), lambda: models.vgg11(weights=None, num_classes=2)]
)
def test_a_plain_network_has_no_residual_branch(make):
    with torch.device("meta"):
        model = make()
    with pytest.raises(ConfigError, match="has no residual branches"):
        residual_branches(model)


def test_a_network_whose_way_depends_on_the_content_says_so():
    class Branching(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(ConfigError, match="Branching cannot be followed from pictures to logits"):
        residual_branches(Branching())


class Block(nn.Module):
    def __init__(self, add):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.offset = nn.Parameter(torch.zeros(1, 4, 1, 1))
        self.add = add

    def forward(self, x):
        return self.add(self, x)


@pytest.mark.parametrize(
    "add",
    [
        lambda m, x: x + m.second(m.first(x)),
        lambda m, x: m.second(m.first(x)) + x,
        lambda m, x: torch.add(x, m.second(m.first(x))),
        lambda m, x: m.second(m.first(x)).add_(x),
        lambda m, x: x + torch.relu(m.second(m.first(x))) * 2,
        lambda m, x: x + m.second(m.first(x)).permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    ],
)
def test_every_way_to_write_the_addition_is_understood(add):
    assert residual_branches(Block(add)) == ["second"]


@pytest.mark.parametrize(
    "add",
    [
        lambda m, x: m.first(x) + m.offset,
        lambda m, x: m.second(m.first(x)) + 1.0,
        lambda m, x: m.first(x) + m.second(x),  # parallel layers
        lambda m, x: x + m.second(x).mean((2, 3), keepdim=True),  # one number for all places
        lambda m, x: x + torch.sigmoid(m.second(m.first(x))),  # dropping the layer would leave a half
        lambda m, x: (y := m.second(x)) * (x + y),  # goes elsewhere, too
    ],
)
def test_a_sum_that_is_no_residual_connection(add):
    with pytest.raises(ConfigError, match="no residual branches"):
        residual_branches(Block(add))


def test_the_first_convolution_and_its_pool_are_found_and_replaced():
    resnet = models.resnet18(weights=None)
    path, convolution = first_convolution(resnet)
    assert (path, convolution.out_channels) == ("conv1", 64)
    assert stem_pool(resnet) == "maxpool"
    assert stem_pool(models.mobilenet_v2(weights=None)) is None
    replace_module(resnet, "layer1.0.conv2", nn.Identity())
    assert isinstance(resnet.layer1[0].conv2, nn.Identity)
    with pytest.raises(ConfigError, match="Sequential has no 2-D convolution"):
        first_convolution(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


class Crossed(nn.Module):
    """Runs in another order than it is written down, with a projection that runs last and a head for nothing."""

    def __init__(self):
        super().__init__()
        self.shortcut, self.deep, self.first = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(1, 4, 3)
        self.head, self.aside = nn.Linear(4, 2), nn.Linear(2, 2)
        self.side = None

    def forward(self, images):
        x = self.first(images)
        y = self.deep(self.deep(x))
        logits = self.head((y + self.shortcut(x)).mean((2, 3)))
        self.side = self.aside(logits)
        return logits


def test_the_first_and_the_classifier_are_told_by_what_runs_and_goes_into_the_logits():
    model = Crossed()
    assert first_convolution(model, (1, 8, 8))[0] == "first"
    assert first_convolution(model)[0] == "shortcut"
    assert classifier(model, (1, 8, 8)) == "head"


def test_norm_layers_of_every_kind_are_found():
    class RunningNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(2))

    class ScaleNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    norms = [
        *(nn.BatchNorm2d(2), nn.SyncBatchNorm(2), nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2)),
        *(nn.RMSNorm(2), RunningNorm(), ScaleNorm()),
    ]
    others = [nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2))]
    model = nn.Sequential(*norms, *others)
    assert norm_layers(model) == [*(str(i) for i in range(8)), "11.0"]
