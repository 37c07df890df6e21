"""The pictures of pruning."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cvtrain.core.artifact import TradeOff
from cvtrain.report import compression
from cvtrain.report.plots import VAL

CURVE = [
    TradeOff(0.0, 1000, 500, 0.95),
    TradeOff(0.1, 810, 410, 0.949, "pruned10"),
    TradeOff(0.2, 640, 330, 0.946, "pruned20"),
    TradeOff(0.3, 490, 250, 0.91, "pruned30"),
    TradeOff(0.5, 250, 130, 0.72, "pruned"),
]


def pixels(path, colour):
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return np.argwhere(np.abs(picture - wanted).sum(-1) < 12)


def test_the_knee_is_marked_on_the_curve(tmp_path):
    compression.tradeoff(CURVE, tmp_path / "a.png", "channels")
    assert len(pixels(tmp_path / "a.png", VAL)) > 50


def test_a_curve_whose_arithmetic_falls_is_drawn_against_it_as_well(tmp_path):
    flat = [TradeOff(p.amount, p.params, 500, p.accuracy, p.artifact) for p in CURVE]
    compression.tradeoff(CURVE, tmp_path / "both.png", "channels of resnet18")
    compression.tradeoff(flat, tmp_path / "one.png", "weights of resnet18")
    (wide, height), (narrow, same) = (Image.open(tmp_path / name).size for name in ("both.png", "one.png"))
    assert wide > 1.5 * narrow
    assert abs(height - same) < 30


@pytest.mark.parametrize("points", [CURVE[:1], CURVE[:2], [*CURVE[:1], TradeOff(0.5, 1, 500, float("nan"), "pruned")]])
def test_odd_curves_are_drawn_too(points, tmp_path):
    compression.tradeoff(points, tmp_path / "a.png", "odd")
    assert Image.open(tmp_path / "a.png").size[0] > 200


def test_zeros_are_dark_where_the_weights_are_zero(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    with torch.no_grad():
        model[0].weight.fill_(1.0)[:4] = 0  # the upper half of the picture
        model[2].weight.fill_(1.0)
    compression.masks(model, tmp_path / "half.png")
    dark, bright = (pixels(tmp_path / "half.png", colour)[:, 0] for colour in ("#00224e", "#fee838"))
    assert len(dark) > 5000
    assert np.median(dark) < np.median(bright)


def test_a_model_without_zeros_or_with_large_layers_is_drawn(tmp_path):
    compression.masks(nn.Linear(3, 3), tmp_path / "none.png")
    wide = nn.Linear(3000, 1000)
    with torch.no_grad():
        wide.weight[torch.rand(wide.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    compression.masks(nn.Sequential(*(copy.deepcopy(wide) for _ in range(8))), tmp_path / "large.png")
    assert Image.open(tmp_path / "none.png").size[0] > 100
    assert Image.open(tmp_path / "large.png").size[0] > 900
