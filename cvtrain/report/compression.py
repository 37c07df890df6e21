"""Pictures of what compression did: the trade-off of pruning in stages, and which weights are zero."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cvtrain.core.artifact import TradeOff
from cvtrain.core.knee import MAX_DROP, knee
from cvtrain.report.plots import INK, TRAIN, VAL, save

mpl.use("Agg")
from matplotlib.figure import Figure

_LAYERS = 6
"""Layers of which the zeros are shown."""
_CELLS = (64, 128)
"""Rows and columns of a layer's picture at most; in larger layers a cell stands for several weights."""


def tradeoff(points: Sequence[TradeOff], path: Path, title: str) -> None:
    """Draw validation accuracy against what was taken away, and against the arithmetic left where that fell.

    The knee is marked, and how far the model may fall before a stage lies behind it.

    Args:
        points: From the model before to the last stage.
        path: The `.png` file.
        title: What was pruned.
    """
    axes = [("taken away [%]", [100 * point.amount for point in points])]
    if points[-1].macs < points[0].macs:
        axes.append(("multiply-accumulates left [%]", [100 * point.macs / points[0].macs for point in points]))
    figure = Figure(figsize=(0.6 + 5.2 * len(axes), 3.9), layout="constrained")
    accuracies = [100 * point.accuracy for point in points]
    found = knee(points)
    for axis, (name, places) in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
        axis.axhline(
            accuracies[0] - 100 * MAX_DROP, color=INK, lw=0.9, ls=":", label="one point below the model before"
        )
        axis.plot(places, accuracies, color=TRAIN, lw=1.8, marker="o", ms=5)
        axis.plot(
            *(places[found], accuracies[found]),
            marker="D", ms=11, mfc="none", mec=VAL, mew=2.2, ls="none", label=f"knee: {_named(points[found])}",
        )  # fmt: skip
        for place, accuracy in zip(places, accuracies, strict=True):
            axis.annotate(
                *(f"{accuracy:.1f}", (place, accuracy)),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        if name.startswith("multiply"):
            axis.invert_xaxis()  # the model before at the left, as beside
        axis.set_xlabel(name)
        axis.margins(x=0.08, y=0.22)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="lower left")
    figure.axes[0].set_ylabel("validation accuracy [%]")
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def masks(model: nn.Module, path: Path) -> None:
    """Draw where the first layers with zeros have them: a row is an output, a column one of its weights.

    Args:
        model: With plain weights, some of them zero.
        path: The `.png` file.
    """
    layers = [
        (name, module.weight.detach().cpu())
        for name, module in model.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear)) and bool((module.weight == 0).any())
    ][:_LAYERS]
    columns = min(3, max(1, len(layers)))
    rows = max(1, -(-len(layers) // columns))
    figure = Figure(figsize=(0.9 + 3.6 * columns, 0.7 + 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    picture: Any = None
    for axis in axes.flat[len(layers) :]:
        axis.axis("off")
    for axis, (name, weight) in zip(axes.flat, layers, strict=False):
        kept = _kept(weight)
        picture = axis.imshow(
            *(kept,), cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest",
            extent=(0, weight[0].numel(), len(weight), 0),
        )  # fmt: skip
        zeros = 100 * float((weight == 0).float().mean())
        axis.set_title(f"{name}  {'×'.join(map(str, weight.shape))}\n{zeros:.1f} % zero", fontsize=8.5)
        axis.set_xlabel("weight of the output", fontsize=8)
        axis.set_ylabel("output", fontsize=8)
        axis.tick_params(labelsize=7)
    if picture is None:
        axes.flat[0].text(0.5, 0.5, "no weight is zero", ha="center", va="center", color=INK)
    else:
        bar = figure.colorbar(picture, ax=axes, fraction=0.03, ticks=[0, 0.5, 1])
        bar.set_label("share of the weights kept", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    save(figure, path)


def _kept(weight: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return `(rows, columns)` in 0..1: the share of each cell's weights that are not zero."""
    kept = (weight != 0).float().flatten(1)
    size = (min(_CELLS[0], kept.shape[0]), min(_CELLS[1], kept.shape[1]))
    cells: np.ndarray[Any, np.dtype[np.float32]] = F.adaptive_avg_pool2d(kept[None, None], size)[0, 0].numpy()
    return cells


def _named(point: TradeOff) -> str:
    return f"{point.artifact}, {100 * point.accuracy:.1f} %" if point.artifact else "the model before"
