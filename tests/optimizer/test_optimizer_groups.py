"""Weight decay on weights only."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchvision import models

from cvtrain.build import Builder
from cvtrain.model import SimpleCNN
from cvtrain.optimizer import param_groups

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


def test_every_optimizer_option_builds_torchs_own_and_takes_a_step():
    assert [path.stem for path in OPTIONS] == ["adam", "adamw", "sgd"]
    for path, kind in zip(OPTIONS, (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD), strict=True):
        node = OmegaConf.to_container(OmegaConf.load(path))
        model = nn.Linear(3, 2)
        before = model.weight.detach().clone()
        optimizer = Builder({"optimizer": node}, []).optimizer(model)
        assert type(optimizer) is kind
        assert {group["lr"] for group in optimizer.param_groups} == {node["lr"]}
        decays = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
        assert decays == {"weight": node["weight_decay"], "bias": 0.0}
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        assert not torch.equal(model.weight, before)
