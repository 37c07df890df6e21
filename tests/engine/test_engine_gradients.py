"""The table of gradients and updates: numbers against formulas, marks, and a file that survives a resume."""

import csv
import math

import pytest
import torch
from engine_parts import make_run, snapshot
from torch import nn

from cvtrain.engine.gradients import GradientTable, measure
from cvtrain.engine.loop import fit


def layer(name, weight, grad, after=None):
    parameter = nn.Parameter(weight if after is None else after)
    parameter.grad = grad
    return (name, parameter), weight


def test_norms_ratios_and_dead_outputs_follow_their_definitions():
    weight = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    grad = torch.tensor([[0.0, 0.6], [0.0, 0.0], [0.8, 0.0], [0.0, 0.0]])
    pair, before = layer("a.weight", weight, grad, after=weight - 0.01 * grad)
    (row,) = measure([pair], {"a.weight": before})
    assert row.shape == "4×2"
    assert row.weight == pytest.approx(5)
    assert row.gradient == pytest.approx(1)
    assert row.gradient_ratio == pytest.approx(0.2)
    assert row.update_ratio == pytest.approx(0.002, rel=1e-4)
    assert row.dead == 0.5
    assert row.mark == ""


def test_gradients_that_fp16_has_scaled_are_shown_unscaled():
    pair, before = layer("w", torch.ones(2, 2), torch.full((2, 2), 65536.0))
    assert measure([pair], {"w": before}, scale=65536.0)[0].gradient == pytest.approx(2)


def marks(**layers):
    named, before = [], {}
    for name, (grad, after) in layers.items():
        weight = torch.ones(4, 4)
        pair, _ = layer(name, weight, grad, after)
        named.append(pair)
        before[name] = weight
    return {row.parameter: row.mark for row in measure(named, before)}


def test_a_layer_that_is_dead_vanishing_exploding_or_not_finite_is_marked():
    one, slow = torch.ones(4, 4), torch.full((4, 4), 0.999)
    mostly_dead = torch.zeros(4, 4)
    mostly_dead[0] = 1.0
    found = marks(
        fine=(one, slow),
        fine_too=(2 * one, slow),
        also_fine=(0.5 * one, slow),
        dead=(mostly_dead, slow),
        small=(1e-4 * one, slow),
        large=(1e4 * one, slow),
        fast=(one, torch.full((4, 4), 0.8)),
        broken=(math.nan * one, slow),
    )
    assert found == {
        **dict.fromkeys(("fine", "fine_too", "also_fine"), ""),
        **{"dead": "dead", "small": "vanishing", "large": "exploding", "fast": "exploding", "broken": "not finite"},
    }


def test_frozen_parameters_are_left_out():
    pair, before = layer("w", torch.ones(2, 2), None)
    assert measure([pair], {"w": before}) == []


def rows(folder):
    with (folder / "gradients.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_shows_the_last_step_of_each_epoch_and_trains_as_without(tmp_path):
    shown = []
    plain, watched = make_run(tmp_path / "plain"), make_run(tmp_path / "watched")
    GradientTable(watched, tmp_path, lambda epoch, found: shown.append((epoch, found)))
    fit(plain)
    fit(watched)
    assert snapshot(plain) == snapshot(watched)
    assert [epoch for epoch, _ in shown] == [1, 2]
    names = [name for name, _ in plain.model.named_parameters()]
    assert [row.parameter for row in shown[0][1]] == names
    steps = watched.steps_per_epoch
    assert [(row["epoch"], row["step"]) for row in rows(tmp_path)[:: len(names)]] == [
        ("1", str(steps)),
        ("2", str(2 * steps)),
    ]
    assert all(row.update > 0 for _, found in shown for row in found if row.is_matrix)


def test_a_resumed_run_keeps_the_rows_from_before_and_writes_each_epoch_once(tmp_path):
    first = make_run(tmp_path / "run", epochs=2)
    GradientTable(first, tmp_path, lambda *_: None)
    fit(first)
    again = make_run(tmp_path / "run", epochs=3)
    again.checkpoints.restore(again)
    GradientTable(again, tmp_path, lambda *_: None)
    fit(again)
    assert sorted({int(row["epoch"]) for row in rows(tmp_path)}) == [1, 2, 3]
    keys = [(row["step"], row["parameter"]) for row in rows(tmp_path)]
    assert len(keys) == len(set(keys)) == 3 * len(list(first.model.parameters()))
