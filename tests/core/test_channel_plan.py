import copy
import json

import pytest
import torch
from torch import nn

from cvtrain.core.channel_plan import apply_plan, fit_sizes, plan_of, set_tensor
from cvtrain.errors import WeightsError


def make(width=8, hidden=6):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.Conv2d(width, width, 3, groups=width),
        nn.GroupNorm(2, width),
        nn.PReLU(width),
        nn.Flatten(),
        nn.Linear(width * 16, hidden),
        nn.LayerNorm(hidden),
        nn.Linear(hidden, 5),
    ).eval()


def test_a_plan_gives_a_dense_network_the_layers_of_a_pruned_one():
    small, model = make(4, 2), make()
    apply_plan(model, json.loads(json.dumps(plan_of(make(), small))))
    assert repr(model) == repr(small)  # what the layers tell of themselves
    model.load_state_dict(small.state_dict())
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(images), small(images))


def test_a_plan_names_only_what_has_changed():
    assert plan_of(make(), make()) == {}
    assert set(plan_of(make(), make(8, 4))) == {"6.weight", "6.bias", "7.weight", "7.bias", "8.weight"}
    assert plan_of(make(), make(8, 4))["6.weight"] == [4, 128]


def test_a_network_without_a_plan_stays_as_it_is():
    model = make()
    before = copy.deepcopy(model.state_dict())
    apply_plan(model, {})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (["0.weight"], "not a mapping"),
        ({"9.weight": [1]}, "no '9.weight'"),
        ({"__class__": [1]}, "no '__class__'"),
        ({"0.weight": [-1, 3, 3, 3]}, "cannot have the shape"),
        ({"0.weight": [0, 3, 3, 3]}, "cannot have the shape"),
        ({"0.weight": [9, 3, 3, 3]}, "cannot have the shape"),
        ({"0.weight": [10**12, 3, 3, 3]}, "cannot have the shape"),
        ({"0.weight": [4, 3, 3]}, "cannot have the shape"),
        ({"0.weight": [4.0, 3, 3, 3]}, "cannot have the shape"),
        ({"0.weight": [True, 3, 3, 3]}, "cannot have the shape"),
        ({"0.weight": "4333"}, "cannot have the shape"),
        ({"0.weight": None}, "cannot have the shape"),
    ],
)
def test_a_damaged_or_hostile_plan_is_refused_and_changes_nothing(plan, words):
    model = make()
    before = repr(model)
    with pytest.raises(WeightsError, match=words):
        apply_plan(model, plan)
    assert repr(model) == before


def test_a_parameter_stays_frozen_and_a_buffer_stays_a_buffer():
    model = make()
    model[1].weight.requires_grad_(False)
    for name in ("weight", "bias", "running_mean", "running_var"):
        set_tensor(model, f"1.{name}", getattr(model[1], name).detach()[:4])
    fit_sizes(model[1])
    assert (model[1].weight.requires_grad, model[1].bias.requires_grad) == (False, True)
    assert isinstance(model[1].weight, nn.Parameter)
    assert model[1].num_features == 4
    assert "running_mean" in dict(model[1].named_buffers())
