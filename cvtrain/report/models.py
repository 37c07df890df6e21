"""What `cvtrain inspect what=model` shows: tables and pictures of networks on paper and on the clock."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from rich.markup import escape
from rich.table import Table

from cvtrain.report.console import human_bytes, short_ms
from cvtrain.report.plots import INK, PALETTE, TRAIN, VAL, save

mpl.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MARKS = "osD^vP*Xh<>p"
LINE = 0.055
"""Least distance of two labels, as a share of a picture's height."""


def pixels(size: Sequence[int | None] | None) -> str:
    """Return a receptive field as text: 43, 7×5, all; – where there is none."""
    if size is None:
        return "–"
    parts = ["all" if side is None else str(side) for side in size]
    return parts[0] if len(set(parts)) == 1 else "×".join(parts)


def layer_table(summary: Any) -> Table:  # noqa: ANN401 - inspection.Summary, a sibling's type
    """Return the layers of a network, stage by stage."""
    frozen = summary.params > summary.trainable
    table = Table(
        title=f"{summary.name}, one picture of {'×'.join(map(str, summary.input))}, layers as they run",
        title_justify="left",
        title_style="bold",
        header_style="bold",
    )
    table.add_column("layer")
    table.add_column("kind")
    names = ("output", "parameters", "frozen", "MACs", "activation", "receptive field", "stride")
    for name in names:
        if name != "frozen" or frozen:
            table.add_column(name, justify="right")

    def row(first: str, kind: str, shape: str, layers: Sequence[Any], last: Sequence[str], style: str | None) -> None:
        sums = [sum(getattr(layer, name) for layer in layers) for name in ("params", "frozen", "macs")]
        cells = [f"{number:,}" if number else "–" for number in sums]
        memory = sum(layer.activation_bytes for layer in layers)
        shown = cells if frozen else [cells[0], cells[2]]
        table.add_row(escape(first), kind, shape, *shown, human_bytes(memory) if memory else "–", *last, style=style)

    for stage, group in itertools.groupby(summary.layers, key=lambda layer: layer.stage):
        layers = list(group)
        if stage:
            table.add_section()
            row(stage, "", "", layers, ("", ""), "bold")
        for layer in layers:
            seen = pixels(layer.field.size if layer.field else None), stride(layer.stride)
            row(layer.path or "(itself)", layer.kind, "×".join(map(str, layer.shape)), [layer], seen, None)
    table.add_section()
    row("total", f"{len(summary.layers)} layers", "", summary.layers, ("", ""), "bold")
    return table


def stride(values: Sequence[float] | None) -> str:
    """Return the pixels between two places as text: 16, 2×4; – where there are no places."""
    if values is None:
        return "–"
    parts = [f"{value:g}" for value in values]
    return parts[0] if len(set(parts)) == 1 else "×".join(parts)


def comparison_table(rows: Sequence[Mapping[str, Any]], timed: str) -> Table:
    """Return networks side by side.

    Args:
        rows: As they are in models.csv.
        timed: Where and how the latency was measured.
    """
    table = Table(
        title=f"Networks side by side; latency {timed}",
        title_justify="left",
        title_style="bold",
        header_style="bold",
        caption="latency: median [5th to 95th percentile]; activations: results of all layers, one picture",
        caption_justify="left",
    )
    table.add_column("model", no_wrap=True)
    batches = [name.removesuffix("_ms_p50") for name in rows[0] if name.endswith("_ms_p50")]
    step = f"training step, batch {rows[0]['batch_size']}"
    heads = ("input", "parameters", "MACs", "weights", "activations", step, "receptive field")
    for name in (*heads, *(f"{name.replace('_', ' ')}, ms" for name in batches)):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            *(escape(row["model"]), row["input"], f"{row['params']:,}", f"{row['macs'] / 1e6:,.1f} M"),
            *(human_bytes(row[name]) for name in ("weights_bytes", "activation_bytes", "memory_bytes")),
            str(row["receptive_field"]),
            *("{} [{}, {}]".format(*(short_ms(row[f"{name}_ms_p{p}"]) for p in (50, 5, 95))) for name in batches),
        )
    return table


def draw_layers(summary: Any, path: Path) -> None:  # noqa: ANN401 - inspection.Summary, a sibling's type
    """Draw parameters, multiply-accumulates, activations and receptive field along the layers, stages marked."""
    layers = summary.layers
    figure = Figure(figsize=(min(16.0, 7 + 0.04 * len(layers)), 8.2), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True)
    at = np.arange(len(layers))
    panels: list[tuple[str, Callable[[Any], float]]] = [
        ("parameters [k]", lambda layer: layer.params / 1e3),
        ("MACs [M]", lambda layer: layer.macs / 1e6),
        ("activation [kB]", lambda layer: layer.activation_bytes / 1e3),
    ]
    for axis, (name, value) in zip(axes, panels, strict=False):
        axis.bar(at, [value(layer) for layer in layers], width=0.9, color=TRAIN)
        axis.set_ylabel(name)
    _draw_fields(axes[3], layers, max(summary.input[1:]))
    starts = [i for i in at if i == 0 or layers[i].stage != layers[i - 1].stage]
    for axis in axes:
        for start in starts[1:]:
            axis.axvline(start - 0.5, color=INK, lw=0.6, alpha=0.5)
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
    for row, start in enumerate(starts):
        if layers[start].stage:
            at_top = (start - 0.4, 1.02 + 0.1 * (row % 2))
            axes[0].annotate(layers[start].stage, at_top, xycoords=("data", "axes fraction"), fontsize=8, color=INK)
    axes[3].set_xlabel("layer, as they run")
    size = "×".join(map(str, summary.input))
    figure.suptitle(
        f"{summary.name} at {size}: {summary.params:,} parameters, {summary.macs / 1e6:,.1f} M MACs", fontsize=11
    )
    save(figure, path)


def _draw_fields(axis: Axes, layers: Sequence[Any], side: int) -> None:
    """Draw the receptive field where it has a size, and shade where it is the whole picture."""
    sizes = [None if layer.field is None else layer.field.size[0] for layer in layers]
    finite = [(i, size) for i, size in enumerate(sizes) if size is not None]
    if finite:
        axis.plot(*zip(*finite, strict=True), "o", ms=3, color=TRAIN)
    axis.axhline(side, color=VAL, lw=1.2, label=f"side of the picture, {side} px")
    whole = [i for i, layer in enumerate(layers) if layer.field is not None and sizes[i] is None]
    for i in whole:
        axis.axvspan(i - 0.5, i + 0.5, color=VAL, alpha=0.15, lw=0, label="all of it" if i == whole[0] else None)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("receptive field [px]")
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def draw_comparison(rows: Sequence[Mapping[str, Any]], timed: str, path: Path) -> None:
    """Draw parameters and multiply-accumulates against the latency of one picture.

    Args:
        rows: As they are in models.csv.
        timed: Where and how the latency was measured.
        path: The file.
    """
    figure = Figure(figsize=(11, max(4.0, 1.6 + 0.32 * len(rows))), layout="constrained")
    panels = (("params", "parameters [M]"), ("macs", "MACs, one picture [M]"))
    for axis, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for i, row in enumerate(rows):
            low, middle, high = (row[f"batch_1_ms_{name}"] for name in ("p5", "p50", "p95"))
            colour, value = PALETTE[i % len(PALETTE)], row[key] / 1e6
            axis.errorbar(value, middle, [[middle - low], [high - middle]], color=colour, alpha=0.6, capsize=3)
            axis.plot(value, middle, MARKS[i % len(MARKS)], color=colour, ms=8)
        sizes = [row[key] / 1e6 for row in rows]
        axis.set_xlim(min(sizes) / 1.6, 1.6 * max(sizes))
        axis.set_ylim(min(row["batch_1_ms_p5"] for row in rows) / 1.3, 1.3 * max(row["batch_1_ms_p95"] for row in rows))
        axis.set_xlabel(label)
        axis.set_ylabel("latency of one picture, median [ms]")
        axis.grid(alpha=0.25, which="both")
        axis.spines[["top", "right"]].set_visible(False)
        _label(axis, [(row[key] / 1e6, row["batch_1_ms_p50"], row["model"]) for row in rows])
    figure.suptitle(f"Networks side by side; bars: 5th to 95th percentile; {timed}", fontsize=10)
    save(figure, path)


def _label(axis: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Name the points at the right edge, no two labels on each other, each with a line to its point."""
    low, high = (math.log(limit) for limit in axis.get_ylim())
    heights: list[float] = []
    order = sorted(range(len(points)), key=lambda i: points[i][1])
    for i in order:
        wanted = (math.log(points[i][1]) - low) / (high - low)
        heights.append(max(wanted, heights[-1] + LINE if heights else 0.0))
    beyond = max(0.0, heights[-1] - 1.0)
    for i, height in zip(order, heights, strict=True):
        x, y, name = points[i]
        axis.annotate(
            *(name, (x, y), (1.04, height - beyond), "data", "axes fraction"),
            fontsize=8.5,
            va="center",
            color=INK,
            arrowprops={"arrowstyle": "-", "lw": 0.8, "alpha": 0.7, "color": PALETTE[i % len(PALETTE)]},
        )
