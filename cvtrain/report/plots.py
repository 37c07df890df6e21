"""Pictures: training curves, confusion matrix, a labelled batch, artifacts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.core.files import write_atomic

mpl.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

INK, TRAIN, VAL = "#1b1f24", "#2a6fdb", "#e07b00"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Told apart also by the colour-blind: Okabe & Ito, "Color universal design", 2008."""


def save(figure: Figure, path: Path) -> NDArray[np.uint8]:
    """Write a figure as PNG and return the picture `(H, W, 3)`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(path, buffer.getvalue())
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))


def curves(history: Sequence[dict[str, float]], path: Path) -> NDArray[np.uint8]:
    """Draw loss, accuracy and learning rate against the epoch; return the picture `(H, W, 3)`."""
    figure = Figure(figsize=(11, 3.2))
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.15, top=0.91, wspace=0.2)
    axes = figure.subplots(1, 3)
    epochs = np.arange(1, len(history) + 1)
    for axis, name in zip(axes[:2], ("loss", "acc"), strict=True):
        for split, colour in (("train", TRAIN), ("val", VAL)):
            axis.plot(epochs, [row[f"{split}/{name}"] for row in history], color=colour, label=split, lw=1.8)
        axis.set_title("loss" if name == "loss" else "accuracy")
        axis.legend(frameon=False)
    axes[2].plot(epochs, [row["lr"] for row in history], color=INK, lw=1.8)
    axes[2].set_title("learning rate")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def confusion(
    matrix: NDArray[np.int64], names: Sequence[str], path: Path, normalize: bool, what: str = "test pictures"
) -> NDArray[np.uint8]:
    """Draw a confusion matrix `(K, K)`, rows true classes; return the picture `(H, W, 3)`.

    Args:
        matrix: Counts.
        names: K class names; written up to 100 classes.
        path: The file.
        normalize: Whether to show each row as shares of it.
        what: What was counted, for the title.
    """
    values = matrix / np.maximum(matrix.sum(1, keepdims=True), 1) if normalize else matrix
    k = len(names)
    square = max(2.6, min(11.0, 0.42 * k))
    shown = [name if len(name) <= 24 else f"{name[:12]}…{name[-11:]}" for name in names] if k <= 100 else []
    size = min(10.0, 0.75 * 72 * square / k)  # lines of text that do not touch
    length = 0.62 / 72 * size * max(map(len, shown), default=0)
    turned = length > 0.8 * square / k
    # Places in inches: to have them found takes longer than everything else.
    left, below = 0.6 + length, 0.6 + (length if turned else size / 72)
    width, height = left + square + 1.1, below + square + 0.45
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((left / width, below / height, square / width, square / height))
    image = axis.imshow(values, cmap="Blues", vmin=0, vmax=1 if normalize else None)
    bar = figure.add_axes(((left + square + 0.15) / width, below / height, 0.17 / width, square / height))
    figure.colorbar(image, cax=bar, label="share of the true class" if normalize else "pictures")
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if shown:
        axis.set_xticks(range(k), shown, rotation=90 if turned else 0, fontsize=size)
        axis.set_yticks(range(k), shown, fontsize=size)
    if k <= 20:
        threshold = 0.55 * (1.0 if normalize else values.max())
        for i, j in zip(*np.nonzero(matrix), strict=True):
            text = f"{values[i, j]:.2f}" if normalize else str(matrix[i, j])
            axis.text(
                j, i, text, ha="center", va="center", fontsize=8, color="white" if values[i, j] > threshold else INK
            )
    axis.set_title(f"{int(matrix.sum()):,} {what}, {int(np.trace(matrix)):,} right", fontsize=11)
    return save(figure, path)


def reliability(panels: Sequence[tuple[str, Any, float]], path: Path) -> NDArray[np.uint8]:
    """Draw how often answers are right against how sure they are; return the picture `(H, W, 3)`.

    Below, which share of the answers each bin of confidence holds.

    Args:
        panels: Side by side: what they are, the evaluation.Reliability of probabilities, and their expected
            calibration error.
        path: The file.
    """
    width = 0.8 + 4.0 * len(panels)
    figure = Figure(figsize=(width, 5.1))
    grid = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False, height_ratios=(3.2, 1))
    figure.subplots_adjust(left=0.75 / width, right=1 - 0.2 / width, bottom=0.16, top=0.94, hspace=0.1, wspace=0.12)
    for column, (title, bins, error) in enumerate(panels):
        upper, lower = grid[:, column]
        edges = np.linspace(0, 1, len(bins.count) + 1)
        middle, step = (edges[1:] + edges[:-1]) / 2, edges[1]
        upper.bar(middle, bins.accuracy, step, color="#8fb4ea", edgecolor="white", lw=0.6)
        spread = np.maximum(0, (bins.accuracy - bins.low, bins.high - bins.accuracy))
        upper.errorbar(
            *(bins.confidence, bins.accuracy, spread),
            fmt="o",
            color=TRAIN,
            ms=4,
            lw=1.3,
            label="share that is right, 95 %",
        )
        upper.plot((0, 1), (0, 1), color=INK, lw=1, ls="--", label="as sure as right")
        upper.set_ylim(0, 1.02)
        upper.set_title(f"{title}: ECE {error:.4f}", fontsize=10.5)
        lower.bar(middle, bins.count / max(1, bins.count.sum()), step, color="#8a95a1", edgecolor="white", lw=0.6)
        lower.set_ylim(0, 1)
        lower.set_xlim(0, 1)
        lower.set_xlabel("confidence of the answer")
        for axis in (upper, lower):
            axis.grid(alpha=0.25)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("accuracy")
    grid[1, 0].set_ylabel("share of\nanswers")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False, fontsize=8.5)
    return save(figure, path)


def batch(images: Tensor, captions: Sequence[str], path: Path) -> None:
    """Draw up to 32 float pictures `(B, C, H, W)` in 0..1 with a caption each."""
    count = min(32, len(images))
    columns = 8
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * 1.35, rows * 1.6))
    # One pair of axes for all: 32 of them take seconds to lay out.
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(rows, 0))
    axis.axis("off")
    axis.set_autoscale_on(False)
    for i in range(count):
        picture = images[i].detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
        picture = picture[..., :3] if picture.shape[2] >= 3 else picture[..., 0]
        row, column = divmod(i, columns)
        height = 1.26 / 1.6  # a square on paper: 1.26 inches of a cell of 1.35 by 1.6
        extent = (column + 0.033, column + 0.967, row + 0.98, row + 0.98 - height)
        axis.imshow(
            *(picture, "gray"), vmin=0, vmax=1, interpolation="nearest", extent=extent, aspect="auto", origin="upper"
        )
        axis.text(column + 0.5, row + 0.96 - height, captions[i], fontsize=7, ha="center", va="bottom")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpg" if path.suffix == ".jpg" else "png", dpi=110)
    write_atomic(path, buffer.getvalue())


def artifacts(rows: Sequence[Any], path: Path, winner: str | None = None) -> None:
    """Draw accuracy against latency, the area of a mark being the file's size.

    Args:
        rows: evaluation.ProofRow, the reference first.
        path: The file.
        winner: Artifact to mark; None: none.
    """
    figure = Figure(figsize=(9, max(4.2, 1.6 + 0.34 * len(rows))), layout="constrained")
    axis = figure.subplots()
    largest = max(row.bytes for row in rows)
    for i, row in enumerate(rows):
        colour, accuracy = PALETTE[i % len(PALETTE)], 100 * row.accuracy
        error = [[100 * max(0.0, row.delta - row.delta_low)], [100 * max(0.0, row.delta_high - row.delta)]]
        axis.errorbar(row.latency_ms_p50, accuracy, yerr=error, color=colour, alpha=0.6, capsize=3, lw=1)
        best = row.artifact == winner
        edge, width = (INK, 2.2) if best else (colour, 0.5)
        axis.scatter(
            *(row.latency_ms_p50, accuracy, 1200 * row.bytes / largest),
            facecolors=colour,
            alpha=0.55,
            edgecolors=edge,
            linewidths=width,
        )
        axis.plot(row.latency_ms_p50, accuracy, "*" if best else ".", color=INK, ms=9 if best else 4)
    latencies = [row.latency_ms_p50 for row in rows]
    axis.set_xscale("log")
    axis.set_xlim(min(latencies) / 1.5, max(latencies) * 1.5)
    axis.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(y=0.25)
    axis.set_xlabel("latency at batch 1, median [ms]")
    axis.set_ylabel("test accuracy [%]")
    axis.set_title("Artifacts: area = file size; bars: 95 % of the difference to fp32; ★ the winner", fontsize=9.5)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    texts = [
        f"{'★ ' * (row.artifact == winner)}{row.artifact}: {100 * row.accuracy:.2f} %, "
        f"{_short(row.latency_ms_p50)} ms, {row.bytes / 1e6:.3g} MB"
        for row in rows
    ]
    _label_at_the_right(axis, [(row.latency_ms_p50, 100 * row.accuracy) for row in rows], texts)
    save(figure, path)


def _label_at_the_right(axis: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """Name the points beside the picture, no two labels on each other, each with a line to its point."""
    low, high = axis.get_ylim()
    gap = 0.8 / max(11, len(points))
    heights: list[float] = []
    order = sorted(range(len(points)), key=lambda i: points[i][1])
    for i in order:
        wanted = (points[i][1] - low) / (high - low)
        heights.append(max(wanted, heights[-1] + gap if heights else 0.0))
    beyond = max(0.0, heights[-1] - 1.0)
    for i, height in zip(order, heights, strict=True):
        axis.annotate(
            *(texts[i], points[i], (1.03, height - beyond), "data", "axes fraction"),
            fontsize=8.5,
            va="center",
            color=INK,
            arrowprops={"arrowstyle": "-", "lw": 0.8, "relpos": (0, 0.5), "color": PALETTE[i % len(PALETTE)]},
        )


def _short(value: float) -> str:
    return f"{value:.{3 if value < 0.1 else 2 if value < 10 else 1}f}"


def lr_range(
    lrs: NDArray[np.float64], losses: NDArray[np.float64], smoothed: NDArray[np.float64], suggestion: float, path: Path
) -> None:
    """Draw a learning-rate range test: losses and their smoothed curve `(n,)` against the rate, the suggestion on it.

    Args:
        lrs: Rates, ascending.
        losses: Of each step.
        smoothed: Their running mean.
        suggestion: The rate to mark.
        path: The file.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(lrs, losses, color=TRAIN, lw=1, alpha=0.35, label="loss of a step")
    axis.plot(lrs, smoothed, color=TRAIN, lw=2, label="smoothed")
    axis.axvline(suggestion, color=VAL, lw=1.5, label=f"suggested: optimizer.lr={suggestion:g}")
    start, low = float(smoothed[0]), float(smoothed.min())
    spread = max(start - low, 0.05 * abs(start))
    axis.set_ylim(low - 0.15 * spread, start + 0.6 * spread)  # the last steps, which diverge, would flatten the rest
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("training loss")
    axis.legend(frameon=False, loc="lower left")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def learning_rate(
    rates: Sequence[float], steps_per_epoch: float, path: Path, title: str = "learning rate", phases: Sequence[Any] = ()
) -> NDArray[np.uint8]:
    """Draw the rate of every step of a run against the epoch; return the picture `(H, W, 3)`.

    Args:
        rates: One for each optimizer step, or for every so manieth.
        steps_per_epoch: Of these in an epoch.
        path: The file.
        title: What the curve is: a schedule's `caption`.
        phases: resizing.Phase or finetune.Phase, marked where there are several.
    """
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    steps = np.arange(len(rates) + 1) / steps_per_epoch
    axis.stairs(rates, steps, color=TRAIN, lw=1.8, baseline=None)
    highest = int(np.argmax(rates))
    for name, at, colour in (("starts at", 0, INK), ("highest", highest, VAL), ("ends at", len(rates) - 1, TRAIN)):
        label = f"{name} {rates[at]:.3g}, epoch {steps[at]:.3g}"
        axis.plot(steps[at], rates[at], "o", color=colour, ms=5, label=label)
    if len(phases) > 1:
        for phase in phases:
            axis.axvline(phase.first, color=INK, lw=0.8, ls=":")
            size = f", {phase.img_size} px" if hasattr(phase, "img_size") else ""
            axis.text(
                *(phase.first, 1.0, f" {phase.name}{size}"),
                transform=axis.get_xaxis_transform(),
                fontsize=8,
                va="top",
            )
    axis.set_ylim(0, 1.12 * max(rates))
    axis.set_xlabel("epoch")
    axis.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return save(figure, path)
