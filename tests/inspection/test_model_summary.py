"""Layers, their sizes and the memory of a training step, each against a reference of another origin."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from cvtrain.core.complexity import count_params
from cvtrain.core.stages import Stage
from cvtrain.errors import ConfigError
from cvtrain.inspection.model_summary import Memory, Summary, in_stages, kept_bytes, trace
from cvtrain.model import SimpleCNN

pytestmark = pytest.mark.usefixtures("one_thread")


def summary_of(model, shape):
    return Summary("x", shape, trace(model, shape), Memory(2, 0, 0, 0, 0))


SLOW = ("vgg16", "mobilenet_v3_small", "googlenet", "swin_t", "efficientnet_b0", "densenet121")


@pytest.mark.parametrize(
    "name",
    ["alexnet", "resnet18", "vit_b_16"] + [pytest.param(name, marks=pytest.mark.slow) for name in SLOW],
)
def test_parameters_and_macs_are_those_that_torchvision_publishes(name):
    extra = {"aux_logits": False} if name == "googlenet" else {}
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **extra)
    found = summary_of(model, (3, 224, 224))
    meta = models.get_model_weights(name).DEFAULT.meta
    assert found.params == count_params(model) == found.trainable
    if not extra:  # torchvision counts the auxiliary classifiers
        assert found.params == meta["num_params"]
    assert found.macs / 1e9 == pytest.approx(meta["_ops"], abs=6e-4)
    if name == "resnet18":
        assert found.macs == 1_814_073_344


@pytest.mark.parametrize("name", ["mobilenet_v3_small", pytest.param("swin_t", marks=pytest.mark.slow)])
def test_the_layers_macs_add_up_to_what_the_flop_counter_counts_in_a_real_run(name):
    model = models.get_model(name, weights=None, num_classes=5).eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, 64, 64))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert 2 * summary_of(model, (3, 64, 64)).macs == counter.get_total_flops()


def test_a_layer_tells_its_shape_parameters_macs_and_the_memory_of_its_result():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 5)
    )
    model[0].weight.requires_grad_(False)
    layers = trace(model, (3, 8, 8))
    assert [layer.kind for layer in layers] == ["Conv2d", "ReLU", "MaxPool2d", "Flatten", "Linear"]
    assert [layer.shape for layer in layers] == [(8, 8, 8), (8, 8, 8), (8, 4, 4), (128,), (5,)]
    assert [layer.params for layer in layers] == [8 * 27 + 8, 0, 0, 0, 128 * 5 + 5]
    assert [layer.frozen for layer in layers] == [8 * 27, 0, 0, 0, 0]
    assert [layer.macs for layer in layers] == [8 * 27 * 64, 0, 0, 0, 128 * 5]
    # The ReLU works in place and the flattening is a view: no memory of their own.
    assert [layer.activation_bytes for layer in layers] == [4 * 512, 0, 4 * 128, 0, 4 * 5]


class Odd(nn.Module):
    """A parameter of its own, a layer twice, a product outside of layers, a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.layer, self.unused = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(3, 7)

    def forward(self, x):
        x = self.layer(self.layer(x)).flatten(2) * self.scale[..., 0]
        return x @ x.mT


def test_nothing_is_counted_twice_and_nothing_is_left_out():
    layers = trace(Odd(), (4, 6, 6))
    assert [layer.path for layer in layers] == ["layer", "layer", "", "unused"]
    assert [layer.params for layer in layers] == [4 * 36 + 4, 0, 4, 28]
    assert [layer.macs for layer in layers] == [144 * 36, 144 * 36, 4 * 36 * 4, 0]
    assert layers[-1].kind == "Linear, not run"


def test_the_model_stays_as_it_was():
    model = models.resnet18(weights=None, num_classes=2).train()
    model.bn1.eval()
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    trace(model, (3, 32, 32))
    kept_bytes(model, (3, 32, 32), 8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert model.training
    assert not model.bn1.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Peeking(nn.Module):
    """A way that depends on the content: tensors without content cannot take it."""

    def __init__(self):
        super().__init__()
        self.net, self.drop = SimpleCNN(3, 1, 8), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.net(x)) if x.sum() >= 0 else x


def test_a_model_that_needs_content_is_run_on_real_tensors_and_stays_as_it_was():
    model = Peeking()
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    plain, found = trace(model.net, (1, 8, 8)), trace(model, (1, 8, 8))
    assert [(f"net.{a.path}", a.macs, a.field) for a in plain] == [(b.path, b.macs, b.field) for b in found[:-1]]
    mask = 3 * 10  # dropout keeps which logits it dropped
    assert kept_bytes(model, (1, 8, 8), 10) - kept_bytes(model.net, (1, 8, 8), 10) in (mask, 4 * mask)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())


def test_a_picture_that_the_model_does_not_take_is_told_with_the_reason():
    with pytest.raises(ConfigError, match="VGG does not take pictures of 3×16×16 ") as caught:
        with torch.device("meta"):
            model = models.vgg11(weights=None)
        trace(model, (3, 16, 16))
    assert "Set another img_size" in str(caught.value)


def measured(model, batch, dtype=None):
    """Return the bytes that autograd really saves in a forward pass, beside the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.train()
    lower = torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), lower:
        output = model(batch)
    total = sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in own)
    assert output.grad_fn is not None
    return total


@pytest.mark.parametrize(
    "name", ["resnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet_v3_small", "swin_t"))]
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_memory_for_the_backward_pass_is_what_autograd_really_saves(name, dtype):
    model = models.get_model(name, weights=None, num_classes=5)
    expected = measured(model, torch.rand(6, 3, 64, 64), dtype)
    # Without content torch takes batch norm's statistics for bfloat16 as well.
    assert kept_bytes(model, (3, 64, 64), 6, dtype) == pytest.approx(expected, rel=0 if dtype is None else 0.005)


def test_what_is_frozen_keeps_nothing_for_the_backward_pass():
    model = models.resnet18(weights=None, num_classes=5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("layer4", "fc")))
    part = kept_bytes(model, (3, 64, 64), 6)
    assert part == measured(model, torch.rand(6, 3, 64, 64))
    model.requires_grad_(True)
    assert part < 0.25 * kept_bytes(model, (3, 64, 64), 6)


def test_layers_go_to_the_stage_that_has_their_module_or_that_of_the_layer_before():
    model = Odd()
    layers = trace(model, (4, 6, 6))
    stages = [Stage("stem", ("layer",), ("layer.weight",)), Stage("head", ("unused",), ("scale", "unused.weight"))]
    assert [(layer.path, layer.stage) for layer in in_stages(layers, stages)] == [
        ("layer", "stem"), ("layer", "stem"), ("", "head"), ("unused", "head"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size", "field"),
    # Araujo, Norris & Sim, Distill 2019, table: inception_v3 1311, whose last map joins ways that see less each.
    [("resnet18", 224, 435), ("inception_v3", 299, 1311), ("mobilenet_v3_small", 224, None)],
)
def test_a_network_sees_what_its_last_map_sees(name, size, field):
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **({"aux_logits": False} if name == "inception_v3" else {}))
    found = summary_of(model, (3, size, size))
    assert found.receptive_field == (field, field)
    assert found.maps[-1].stride == (32, 32)


def test_a_network_without_maps_has_no_receptive_field():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    assert summary_of(model, (3, 4, 4)).receptive_field is None
