"""Weight decay on weights only."""

import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchvision import models

from cvtrain.build import Builder
from cvtrain.errors import ConfigError
from cvtrain.model import SimpleCNN
from cvtrain.optimizer import lion, muon, param_groups

OPTIONS = sorted((Path(__file__).resolve().parents[2] / "configs" / "optimizer").glob("*.yaml"))
NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


@pytest.mark.parametrize(
    "make", [lambda: SimpleCNN(10, 1, 8), lambda: models.resnet18(num_classes=2), lambda: models.swin_t(num_classes=2)]
)
def test_norms_and_biases_are_spared_and_every_other_parameter_decays(make):
    with torch.device("meta"):
        model = make()
    groups = param_groups(model, 0.05)
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.05]
    decayed = {name for group in groups if group["weight_decay"] for name in group["param_names"]}
    weights = {
        f"{path}.weight" if path else "weight"
        for path, m in model.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    }
    norms = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, NORMS)}
    names = {name for name, _ in model.named_parameters()}
    assert weights <= decayed
    assert not decayed & norms
    assert not any(name.endswith(".bias") for name in decayed)
    assert {name for group in groups for name in group["param_names"]} == names
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_names_and_parameters_of_a_group_belong_together():
    model = SimpleCNN(10, 1, 8)
    by_name = dict(model.named_parameters())
    for group in param_groups(model, 0.1):
        assert [id(p) for p in group["params"]] == [id(by_name[name]) for name in group["param_names"]]


def test_frozen_parameters_are_left_out():
    model = SimpleCNN(10, 1, 8)
    model.features.requires_grad_(False)
    assert sorted(name for group in param_groups(model, 0.1) for name in group["param_names"]) == [
        "head.bias",
        "head.weight",
    ]


def test_without_weight_decay_there_is_one_group():
    assert [group["weight_decay"] for group in param_groups(SimpleCNN(10, 1, 8), 0.0)] == [0.0]


def test_a_step_without_gradients_shrinks_the_weights_only():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    nn.init.ones_(model[0].bias)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.SGD(param_groups(model, 0.1), lr=0.5).step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (1 - 0.5 * 0.1 if name == "0.weight" else 1.0)), name


TOKENS = {
    "vit_b_16": {"class_token", "encoder.pos_embedding"},
    "swin_t": {
        f"features.{i}.{j}.attn.relative_position_bias_table"
        for i, n in ((1, 2), (3, 2), (5, 6), (7, 2))
        for j in range(n)
    },
    "convnext_tiny": {f"features.{i}.{j}.layer_scale" for i, n in ((1, 3), (3, 3), (5, 9), (7, 3)) for j in range(n)},
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_position_embeddings_and_layer_scales_of_torchvision_are_spared(name):
    with torch.device("meta"):
        model = models.get_model(name, weights=None)
    spared = {n for group in param_groups(model, 0.1) if not group["weight_decay"] for n in group["param_names"]}
    assert TOKENS[name] <= spared
    assert {n for n in spared if dict(model.named_parameters())[n].ndim > 1} == TOKENS[name]


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224", "xcit_nano_12_p16_224"],
)
def test_what_a_timm_model_names_in_no_weight_decay_is_spared_and_every_layers_weight_decays(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    groups = param_groups(model, 0.1)
    spared = {n for group in groups if not group["weight_decay"] for n in group["param_names"]}
    named = model.no_weight_decay() & {n for n, _ in model.named_parameters()}
    assert named <= spared
    layers = [path for path, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert not {f"{path}.weight" for path in layers} & spared
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_no_weight_decay_is_asked_by_full_name():
    class Model(SimpleCNN):
        def no_weight_decay(self):
            return {"head.weight"}

    spared = [g for g in param_groups(Model(10, 1, 8), 0.1) if not g["weight_decay"]]
    assert "head.weight" in spared[0]["param_names"]


def test_a_free_standing_matrix_decays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.token = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(1, 1, 4))

    decays = {n: g["weight_decay"] for g in param_groups(Model(), 0.1) for n in g["param_names"]}
    assert decays == {"matrix": 0.1, "token": 0.0}


def test_every_optimizer_option_builds_what_it_names_and_takes_a_step():
    optim = pytest.importorskip("timm.optim")
    kinds = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "lion": optim.Lion,
        "muon": optim.Muon,
        "sgd": torch.optim.SGD,
    }
    assert [path.stem for path in OPTIONS] == list(kinds)
    for path, kind in zip(OPTIONS, kinds.values(), strict=True):
        node = OmegaConf.to_container(OmegaConf.load(path))
        model = nn.Linear(8, 6)
        before = model.weight.detach().clone()
        optimizer = Builder({"optimizer": node}, []).optimizer(model)
        assert type(optimizer) is kind
        assert {group["lr"] for group in optimizer.param_groups} == {node["lr"]}
        assert node.get("fused", False) == ("fused" in optimizer.defaults)
        decays = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
        assert decays == {"weight": node["weight_decay"], "bias": 0.0}
        model(torch.ones(4, 8)).sum().backward()
        optimizer.step()
        assert not torch.equal(model.weight, before)


def test_without_timm_lion_and_muon_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    for name in ("lion", "muon"):
        node = OmegaConf.to_container(OmegaConf.load(next(path for path in OPTIONS if path.stem == name)))
        with pytest.raises(ConfigError, match=rf"optimizer={name} needs the package timm.*\n.*cvtrain\[timm\]"):
            Builder({"optimizer": node}, []).optimizer(nn.Linear(3, 2))


def stepped(make, model, steps=3):
    """The weights after some steps on fixed gradients."""
    optimizer = make(param_groups(model, 0.1))
    for step in range(steps):
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_lion_is_the_papers_algorithm():
    pytest.importorskip("timm")
    torch.manual_seed(9)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in expected.items()}
    decay = {name: 0.1 if p.ndim > 1 else 0.0 for name, p in expected.items()}
    for step in range(3):
        torch.manual_seed(step)
        for (name, p), q in zip(expected.items(), model.parameters(), strict=True):
            gradient = torch.randn_like(q).double()
            direction = (0.9 * momentum[name] + 0.1 * gradient).sign()
            p.sub_(0.01 * (direction + decay[name] * p))
            momentum[name] = 0.99 * momentum[name] + 0.01 * gradient
    _, found = stepped(lambda groups: lion(groups, 0.01, (0.9, 0.99), 0.1), model)
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value, atol=1e-6), name


def test_muon_makes_the_steps_of_matrices_and_convolutions_orthogonal_and_leaves_the_rest_to_adamw():
    pytest.importorskip("timm")
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8, 6)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, after = stepped(lambda groups: muon(groups, 0.01, 0.95, False, (0.9, 0.95), 0.0), model, steps=1)
    kinds = {name: optimizer.state[p]["use_muon"] for name, p in model.named_parameters()}
    assert {name for name, matrix in kinds.items() if matrix} == {"0.weight", "4.weight"}
    for name, matrix in kinds.items():
        step = (after[name] - before[name]).flatten(1) if after[name].ndim > 1 else after[name] - before[name]
        if matrix:
            values = torch.linalg.svdvals(step) / (0.01 * 0.2 * max(step.shape) ** 0.5)
            assert values.min() > 0.6, name
            assert values.max() < 1.4, name
        else:
            assert torch.allclose(step.abs(), torch.full_like(step, 0.01), atol=4e-4), name  # and some decay
