"""Grids of pictures with captions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from cvtrain.core.files import write_atomic

mpl.use("Agg")
from matplotlib.figure import Figure

INK, QUIET = "#1b1f24", "#5b6570"
CELL, GAP = 1.18, 0.06
"""Inches a picture takes, and between two."""
APART = 0.22
"""Inches between groups of columns."""
HEAT, SIGNED = "viridis", "PuOr"
"""Colour maps that the colour-blind read as well: of values from 0 on, and of values to both sides of 0."""
SHOWN = 112
"""Pixels that a smaller picture is enlarged to before something smooth is laid over it."""


def grid(
    path: Path,
    title: str,
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    group: int = 0,
    scale: tuple[str, str, str] | None = None,
) -> None:
    """Write rows of pictures as a PNG.

    Args:
        path: The file.
        title: Above all.
        rows: Pictures uint8 `(H, W, C)`; small ones are enlarged without blurring.
        row_names: One a row, at its left; lines broken by the caller.
        column_names: One a column, above it.
        captions: One a picture, below it; lines broken by the caller, about 20 signs each.
        group: Columns that belong together, set apart from the next ones; 0: all.
        scale: A colour map and what its ends mean, explained below the title; None: none.
    """
    columns = max(len(row) for row in rows)
    left = 0.08 + 0.082 * max((max(map(len, name.split("\n"))) for name in row_names), default=0)
    lines = [1 + max((text.count("\n") for text in row), default=0) for row in captions] or [0] * len(rows)
    offsets = [left + c * (CELL + GAP) + (c // group if group else 0) * APART for c in range(columns)]
    top = 0.46 + (0.24 if scale else 0) + (0.22 if column_names else 0)
    heights = [CELL + (0.04 + 0.14 * count if count else GAP) for count in lines]
    height = top + sum(heights) + 0.06
    width = max(offsets[-1] + CELL + GAP, 0.092 * max(map(len, title.split("\n"))) + 0.3, 3.6 if scale else 0)
    figure = Figure(figsize=(width, height))
    # One pair of axes in inches for all: a hundred of them take seconds to lay out.
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axis.set_axis_off()
    axis.set_autoscale_on(False)
    axis.text(0.1, 0.12, title, va="top", fontsize=11, weight="bold", color=INK)
    if scale:
        ramp = np.linspace(0, 1, 128)[None]
        axis.imshow(ramp, cmap=scale[0], extent=(0.1, 1.3, 0.56, 0.45), aspect="auto")
        axis.text(1.38, 0.51, f"{scale[1]} → {scale[2]}", va="center", fontsize=8, color=QUIET)
    y = top
    for r, row in enumerate(rows):
        if row_names:
            axis.text(0.1, y + CELL / 2, row_names[r], va="center", fontsize=8.5, color=INK, linespacing=1.3)
        for c, picture in enumerate(row):
            x = offsets[c]
            shown = picture[..., 0] if picture.shape[-1] == 1 else picture
            smooth = "nearest" if picture.shape[0] < 100 else "antialiased"
            axis.imshow(
                *(shown, "gray"), vmin=0, vmax=255, interpolation=smooth, extent=(x, x + CELL, y + CELL, y),
                aspect="auto",
            )  # fmt: skip
            if column_names and r == 0:
                axis.text(x + CELL / 2, y - 0.04, column_names[c], ha="center", va="bottom", fontsize=8, color=QUIET)
            if captions:
                below = x + CELL / 2, y + CELL + 0.03
                axis.text(*below, captions[r][c], ha="center", va="top", fontsize=7, color=QUIET, linespacing=1.15)
        y += heights[r]
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    write_atomic(path, buffer.getvalue())


def enlarged(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return `(H, W, C)` with its pixels repeated until it has 112 a side or a few more."""
    times = max(1, -(-SHOWN // min(picture.shape[:2])))
    return np.repeat(np.repeat(picture, times, 0), times, 1)


def overlay(picture: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return `(H, W, 3)`: a picture in grey with a map in 0..1 over it, the more in colour the higher it is.

    Args:
        picture: uint8 `(H, W, C)`.
        heat: `(H, W)`.
    """
    grey = picture.mean(2, keepdims=True) / 255
    colours = mpl.colormaps[HEAT](heat)[..., :3]
    share = 0.2 + 0.5 * heat[..., None]
    return np.asarray((255 * ((1 - share) * grey + share * colours)).round().clip(0, 255), np.uint8)


def coloured(values: NDArray[np.float32], colour_map: str) -> NDArray[np.uint8]:
    """Return values `(H, W)` in 0..1 as `(H, W, 3)`."""
    return np.asarray((255 * mpl.colormaps[colour_map](values)[..., :3]).round(), np.uint8)


def shortened(text: str, most: int = 20) -> str:
    """Return `text`, or its begin and end around an ellipsis, in at most `most` signs."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - half]}…{text[-half:]}"
