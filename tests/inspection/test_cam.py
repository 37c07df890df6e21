"""Grad-CAM by its definition, on networks of many kinds."""

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from cvtrain.errors import ConfigError
from cvtrain.inspection.cam import cam_layer, grad_cam, weighted_map
from cvtrain.inspection.maps import as_map, chosen_maps, map_layers

pytestmark = pytest.mark.usefixtures("one_thread")


class Pooled(nn.Module):
    """A convolution that keeps the size, the mean of each map, a linear layer."""

    def __init__(self, channels=2, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.linear = nn.Linear(channels, classes, bias=False)

    def forward(self, images):
        return self.linear(self.conv(images).mean((2, 3)))


def test_a_small_case_by_hand():
    model = Pooled()
    with torch.no_grad():
        model.conv.weight.zero_()
        model.conv.weight[0, 0, 1, 1] = 1.0  # the picture itself
        model.conv.weight[1, 0, 1, 0] = 2.0  # twice its left neighbour
        model.linear.weight.copy_(torch.tensor([[4.0, 1.0], [-1.0, 3.0], [-1.0, -1.0]]))
    picture = torch.tensor([[[[1.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 3.0, 0], [0, 0, 0, 0]]]])
    # The means' gradients are the linear layer's weights over 16 places: 4/16 and 1/16 for class 0.
    by_hand = np.array([[4.0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 12, 6], [0, 0, 0, 0]]) / 16
    heat = grad_cam(model, picture, torch.tensor([0]), "conv")[0].numpy()
    np.testing.assert_allclose(heat, by_hand / by_hand.max(), atol=1e-6)
    # Class 1: -1/16 of the picture and 3/16 of the other map; what is negative counts as 0.
    second = np.maximum(0, np.array([[-1.0, 6, 0, 0], [0, 0, 0, 0], [0, 0, -3, 18], [0, 0, 0, 0]]))
    heat = grad_cam(model, picture, torch.tensor([1]), "conv")[0].numpy()
    np.testing.assert_allclose(heat, second / second.max(), atol=1e-6)
    assert float(grad_cam(model, picture, torch.tensor([2]), "conv").abs().max()) == 0, "nothing speaks for class 2"


def test_the_weights_are_the_mean_slopes_that_differences_of_the_logit_give():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 5)
    ).double()
    picture, asked = torch.randn(1, 1, 8, 8, dtype=torch.float64), 3
    with torch.no_grad():
        maps = model[:2](picture)
        slopes = torch.zeros_like(maps)
        for place in np.ndindex(*maps.shape):
            step = torch.zeros_like(maps)
            step[place] = 1e-5
            above, below = (model[2:](maps + sign * step)[0, asked] for sign in (1, -1))
            slopes[place] = (above - below) / 2e-5
        by_differences = torch.relu((slopes.mean((2, 3), keepdim=True) * maps).sum(1))
    assert torch.allclose(weighted_map(maps, slopes), by_differences)
    enlarged = nn.functional.interpolate(by_differences[None], size=(8, 8), mode="bilinear", align_corners=False)[0]
    heat = grad_cam(model, picture, torch.tensor([asked]), "1")
    torch.testing.assert_close(heat.double(), enlarged / enlarged.max(), atol=1e-5, rtol=0)


def test_a_layer_that_the_next_one_overwrites_is_taken_as_it_was():
    torch.manual_seed(0)
    heats = []
    for in_place in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(inplace=in_place), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        )
        images = torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
        heats.append(grad_cam(model, images, torch.tensor([0, 1]), "0"))
    assert float(heats[0].max()) == 1
    torch.testing.assert_close(*heats)


def vit(**settings):
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4, **settings
    )
    nn.init.normal_(model.heads.head.weight)  # torchvision begins with zeros
    return model


def swin():
    return torchvision.models.SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=[4, 4], num_classes=4
    )


def plain():
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 4))


def dense():
    return torchvision.models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=4)


NETWORKS = {
    # The sum behind the last block, not the convolution on its branch.
    "timm resnet": (lambda: timm.create_model("test_resnet", num_classes=4), 128, "layer4"),
    # Below 4×4 the stage before is asked.
    "timm resnet on small pictures": (lambda: timm.create_model("test_resnet", num_classes=4), 64, "layer3"),
    # All channels, not the four that the last convolution adds.
    "densenet": (dense, 128, "features"),
    "plain": (plain, 32, "4"),  # in front of the last pooling
    "swin": (swin, 32, "permute"),
    # Only the class token of the last block is read.
    "vit": (vit, 32, "encoder.layers.encoder_layer_1"),
    "timm vit": (lambda: timm.create_model("test_vit", num_classes=4), 160, "blocks.4"),
    "timm convnext": (lambda: timm.create_model("test_convnext", num_classes=4), 160, "stages"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network_has_a_layer_to_explain_and_stays_as_it_was(name):
    make, size, layer = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(2, 3, size, size)
    assert cam_layer(model, images[:1]) == layer
    heat = grad_cam(model, images, torch.tensor([0, 3]))
    assert heat.shape == (2, size, size)
    assert float(heat.min()) >= 0
    assert float(heat.max()) == 1
    assert float(heat.std()) > 0.01
    torch.testing.assert_close(grad_cam(model, images[1:], torch.tensor([3])), heat[1:], atol=1e-3, rtol=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_map_lies_where_the_class_is():
    """A convolution that answers to bright columns and one that answers to dark ones, each the vote of its class."""
    model = Pooled(2, 2)
    with torch.no_grad():
        model.conv.weight.zero_()
        model.conv.weight[:, 0, 1, 1] = torch.tensor([1.0, -1.0])
        model.linear.weight.copy_(torch.eye(2))
    images = torch.zeros(1, 1, 12, 12)
    images[..., 2:4], images[..., 8:10] = 1.0, -1.0
    for number, (first, last) in enumerate(((2, 4), (8, 10))):
        heat = grad_cam(model, images, torch.tensor([number]))[0]
        assert torch.equal(heat > 0.5, torch.isin(torch.arange(12), torch.arange(first, last)).expand(12, 12))


def test_tokens_and_channels_last_become_maps():
    tokens = torch.arange(2 * 11 * 3.0).view(2, 11, 3)  # two that are no places, then 3×3
    grid = as_map(tokens, 2)
    assert grid.shape == (2, 3, 3, 3)
    assert torch.equal(grid[1, :, 2, 1], tokens[1, 2 + 7])
    last = torch.randn(2, 5, 5, 7)
    assert torch.equal(as_map(last, 2), last.permute(0, 3, 1, 2))
    first = torch.randn(2, 7, 5, 5)
    assert as_map(first, 2) is first
    assert as_map(torch.randn(8, 4, 6), 2) is None, "windows"
    assert as_map(torch.randn(2, 6), 2) is None


def test_maps_are_spread_over_the_depth_or_those_that_are_asked_for():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4).eval()
    images = torch.randn(2, 3, 64, 64)
    layers = map_layers(model, (3, 64, 64))
    assert layers[0] == "conv1"
    assert layers[-1] == "layer4"
    found = chosen_maps(model, images, [], 4)
    assert (len(found), next(iter(found)), list(found)[-1]) == (4, "conv1", "layer4")
    asked = chosen_maps(model, images, ["layer3", "layer1.0.conv1"], 4)
    assert {path: tuple(each.shape) for path, each in asked.items()} == {
        "layer3": (2, 256, 4, 4),
        "layer1.0.conv1": (2, 64, 16, 16),
    }
    direct = model.layer1[0].conv1(model.maxpool(model.relu(model.bn1(model.conv1(images)))))
    torch.testing.assert_close(asked["layer1.0.conv1"], direct)


def test_a_layer_that_is_not_there_or_has_no_map_is_refused_with_a_way_out():
    model, images = Pooled(), torch.zeros(1, 1, 8, 8)
    with pytest.raises(ConfigError, match="layer=convv is no layer of Pooled; did you mean 'conv'"):
        grad_cam(model, images, torch.tensor([0]), "convv")
    with pytest.raises(ConfigError, match=r"layer=linear: this Linear returns no feature map"):
        grad_cam(model, images, torch.tensor([0]), "linear")
    with pytest.raises(ConfigError, match=r"layers=linear: this Linear returns no feature map"):
        chosen_maps(model, images, ["conv", "linear"], 4)
    with pytest.raises(ConfigError, match="Sequential has no feature map of several places for pictures of 8×8"):
        cam_layer(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), images)
