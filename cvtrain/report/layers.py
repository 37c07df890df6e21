"""A picture of how the weights of each layer are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from cvtrain.report.grids import shortened
from cvtrain.report.plots import INK, TRAIN, VAL, save

mpl.use("Agg")
from matplotlib.figure import Figure

MOST = 100
"""Layers in the picture; all are in the table."""


def distributions(layers: Sequence[Any], reach: float, title: str, path: Path) -> None:
    """Draw the histogram of each layer's weights, their standard deviation and how many are near zero.

    Args:
        layers: inspection.weights.Weights, input to output; above 100 as many of them, evenly spread.
        reach: Standard deviations to each side of zero that the histograms reach.
        title: Above all.
        path: The `.png` file.
    """
    shown = [layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, min(MOST, len(layers))).round().astype(int))]
    count = len(shown)
    figure = Figure(figsize=(11, 1.6 + 0.19 * max(8, count)), layout="constrained")
    heat, spread, zeros = figure.subplots(1, 3, sharey=True, width_ratios=(3.2, 1.2, 1.2))
    table = np.stack([layer.histogram for layer in shown])
    # Square roots, so that the tails are seen beside the middle.
    picture = heat.imshow(
        *(np.sqrt(table / table.max(1, keepdims=True)),), cmap="viridis", aspect="auto", vmin=0, vmax=1,
        extent=(-reach, reach, count - 0.5, -0.5), interpolation="nearest",
    )  # fmt: skip
    names = [f"{shortened(layer.name, 34)}  {'×'.join(map(str, layer.shape))}" for layer in shown]
    heat.set_yticks(range(count), names)
    heat.tick_params(axis="y", labelsize=7, length=0)
    heat.set_xlabel("weight / its layer's standard deviation")
    bar = figure.colorbar(picture, ax=heat, fraction=0.03, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0", "¼", "1"])
    bar.set_label("share of the fullest bin", fontsize=8)
    places = np.arange(count)
    spread.plot([layer.std for layer in shown], places, "o", ms=4, color=TRAIN)
    spread.set_xlim(left=0)
    spread.locator_params(axis="x", nbins=4)
    spread.set_xlabel("standard deviation")
    zeros.barh(places, [100 * layer.near_zero for layer in shown], height=0.7, color=VAL)
    zeros.set_xlabel("≤ 1 % of the largest [%]")
    for axis in (spread, zeros):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0, labelleft=False)
    part = f", {count} of {len(layers)} layers" if count < len(layers) else ""
    figure.suptitle(f"{title}{part}", fontsize=11, weight="bold", color=INK, x=0.01, ha="left")
    save(figure, path)
