"""Stochastic depth on residual networks of every kind, against the places that their authors drop at."""

import collections
import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import models
from torchvision.ops import StochasticDepth as TorchvisionStochasticDepth

from cvtrain.core.anatomy import residual_branches
from cvtrain.errors import ConfigError
from cvtrain.model import torchvision_model
from cvtrain.regularizer import Dropout, StochasticDepth, drop_rates

TORCHVISION = {
    "resnet18": (8, 32),
    "resnet50": (16, 32),
    "resnext50_32x4d": (16, 32),
    "wide_resnet50_2": (16, 32),
    "mobilenet_v2": (10, 32),
    "mobilenet_v3_small": (6, 32),
    "efficientnet_b0": (9, 32),
    "efficientnet_v2_s": (35, 32),
    "convnext_tiny": (18, 32),
    "regnet_x_400mf": (22, 32),
    "regnet_y_400mf": (16, 32),
    "mnasnet0_5": (10, 32),
    "vit_b_16": (24, 32),
    "swin_t": (24, 32),
    "swin_v2_t": (24, 32),
    "maxvit_t": (None, 224),
}
"""Number of residual branches, counted by hand in the papers' tables, and a size in pixels."""

QUICK = ("resnet18",)

TIMM = {
    "resnet10t": 1,
    "resnext50_32x4d": 1,
    "res2net50_26w_4s": 1,
    "mobilenetv2_035": 0,
    "mobilenetv3_small_050": 0,
    "mobilenetv4_conv_small_035": 0,
    "efficientnet_b0": 0,
    "tf_efficientnetv2_b0": 0,
    "convnext_atto": 1,
    "vit_tiny_patch16_224": 2,
    "deit_tiny_distilled_patch16_224": 2,
    "beit_base_patch16_224": 2,
    "swin_tiny_patch4_window7_224": 2,
    "swinv2_tiny_window8_256": 2,
    "regnetx_002": 1,
    "regnety_002": 1,
    "mixer_s32_224": 0,
    "resmlp_12_224": 0,
    "poolformer_s12": 2,
    "pvt_v2_b0": 2,
    "levit_128s": 0,
}
"""Branches whose own rate is 0 and that timm therefore has no module for: linspace(0, rate, blocks) starts at 0."""

SMALLER = {"beit_base_patch16_224": {"depth": 4, "embed_dim": 48, "num_heads": 3}}
"""Where the family has no small member."""


pytestmark = pytest.mark.usefixtures("one_thread")


def slow(names, quick=()):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def awake(model):
    """Fresh norms, layer scales and heads hide what a branch does; other randomness would hide the drops."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "scale" in name or "gamma" in name:
            nn.init.uniform_(parameter, 0.3, 0.6)
        elif float(parameter.abs().max()) < 1e-3:  # 0, or scaled down as BEiT's head is
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, TorchvisionStochasticDepth):
            module.p = 0.0
    return model


def trained(model, images):
    """The output in training, where batch norm looks at the batch alone."""
    torch.manual_seed(0)
    output = model.train()(images)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def held(model, shape, branches=None):
    """Check what has to be true of any network: rates, names, evaluation, training; return the rates."""
    names, images = list(awake(model).state_dict()), torch.randn(2 if shape[-1] > 64 else 4, *shape)
    undropped = trained(model, images)
    plain = model.eval()(images)
    StochasticDepth(0.999).attach(model, shape)
    found = drop_rates(model)
    count = branches or len(found)
    assert list(found.values()) == pytest.approx([0.999 * (i + 1) / count for i in range(count)])
    assert list(model.state_dict()) == names
    assert torch.equal(model.eval()(images), plain)
    dropped = trained(model, images)
    assert not torch.allclose(dropped, undropped, rtol=1e-3)
    assert torch.equal(trained(model, images), dropped)
    return found


@pytest.mark.parametrize("name", slow(TORCHVISION, QUICK))
def test_every_residual_family_of_torchvision(name):
    branches, size = TORCHVISION[name]
    held(torchvision_model(3, 3, size, name), (3, size, size), branches)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_every_residual_family_of_timm_drops_where_timm_itself_drops(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False, num_classes=3, **SMALLER.get(name, {}))
    shape = model.pretrained_cfg["input_size"]
    found = held(model, shape)
    with torch.device("meta"):
        own = timm.create_model(name, pretrained=False, drop_path_rate=0.5, **SMALLER.get(name, {}))
    calls = collections.Counter()
    for path, module in own.named_modules():
        if type(module).__name__ == "DropPath":
            module.register_forward_hook(lambda m, i, o, path=path: calls.update([path]))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        own.eval()(torch.empty(1, *shape, device="meta"))
    assert len(found) == sum(calls.values()) + TIMM[name]
    places = sorted({place(path) for path in found})
    assert set(map(place, calls)) <= set(places)


def place(path):
    """The block that a path lies in: all up to its last number, or RegNet's b1."""
    parts = path.split(".")
    last = max(i for i, part in enumerate(parts) if re.fullmatch(r"b?\d+", part))
    return ".".join(parts[: last + 1])


@pytest.mark.parametrize(
    "name", ["densenet121", "vgg11", "alexnet", "googlenet", "squeezenet1_0", "shufflenet_v2_x0_5"]
)
def test_networks_without_residual_branches_are_refused_with_the_fix(name):
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    with pytest.raises(ConfigError, match=r"(?s)does not fit .* has no residual branches.*model=resnet18"):
        StochasticDepth(0.1).attach(model)


@pytest.mark.slow
def test_the_networks_own_stochastic_depth_rests():
    model = models.efficientnet_b0(weights=None, num_classes=2)
    assert any(m.p > 0 for m in model.modules() if isinstance(m, TorchvisionStochasticDepth))
    StochasticDepth(0.2).attach(model)
    assert {m.p for m in model.modules() if isinstance(m, TorchvisionStochasticDepth)} == {0.0}
    adding = [path for path, m in model.named_modules() if getattr(m, "use_res_connect", False)]
    assert [path.removesuffix(".stochastic_depth") for path in drop_rates(model)] == adding


@torch.no_grad()
def test_the_mean_of_many_draws_of_one_branch_is_the_plain_networks_output():
    """Of a network that is linear after its branch; with more, what follows would bend the mean."""
    model = awake(models.resnet18(weights=None, num_classes=3))
    model.layer4[1].relu = nn.Identity()
    images, end = torch.randn(4, 3, 32, 32), residual_branches(model)[-1]
    plain = trained(model, images)
    StochasticDepth(0.5).attach(model)
    for path in drop_rates(model):
        if path != end:
            model.get_submodule(path)._forward_hooks.clear()
    torch.manual_seed(0)
    outputs = torch.stack([model(images) for _ in range(100)])
    error = outputs.std(0) / len(outputs) ** 0.5
    assert (error > 0).all()
    assert ((outputs.mean(0) - plain).abs() < 4 * error).all()


def test_gradients_reach_every_parameter_behind_the_drops():
    torch.manual_seed(0)
    model = awake(torchvision_model(3, 3, 32, "resnet18"))
    StochasticDepth(0.3).attach(model)
    model.train()(torch.randn(16, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 40, 48, 112])
def test_the_size_that_a_run_has_is_taken_even_where_a_network_takes_no_other(size):
    model = torchvision_model(3, 3, size - size % 16, "vit_b_16")
    StochasticDepth(0.1).attach(model, (3, size - size % 16, size - size % 16))
    assert len(drop_rates(model)) == 24


@pytest.mark.slow
def test_dropout_and_stochastic_depth_compile_without_a_break():
    model = torchvision_model(3, 3, 32, "resnet18")
    StochasticDepth(0.5).attach(model, (3, 32, 32))
    Dropout(0.5).attach(model, (3, 32, 32))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(compiled.eval()(images), model.eval()(images))
        assert not torch.equal(compiled.train()(images), model.eval()(images))
