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
CELL = 1.18
"""Inches a picture takes."""


def grid(
    path: Path,
    title: str,
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
) -> None:
    """Write rows of pictures as a PNG.

    Args:
        path: The file.
        title: Above all.
        rows: Pictures uint8 `(H, W, C)`; small ones are enlarged without blurring.
        row_names: One a row, at its left; lines broken by the caller.
        column_names: One a column, above it.
        captions: One a picture, below it.
    """
    columns = max(len(row) for row in rows)
    left = 0.02 + 0.082 * max((max(map(len, name.split("\n"))) for name in row_names), default=0)
    cell_height = CELL + (0.2 * (1 + max(text.count("\n") for row in captions for text in row)) if captions else 0.06)
    top = 0.46 + (0.22 if column_names else 0)
    width, height = left + columns * (CELL + 0.06) + 0.06, top + len(rows) * cell_height + 0.06
    width = max(width, 0.092 * len(title) + 0.3)
    figure = Figure(figsize=(width, height))
    figure.text(0.1 / width, 1 - 0.14 / height, title, va="top", fontsize=11, weight="bold", color=INK)
    for r, row in enumerate(rows):
        base = height - top - (r + 1) * cell_height
        if row_names:
            middle = (base + cell_height - CELL / 2 - 0.03) / height
            figure.text(0.1 / width, middle, row_names[r], va="center", fontsize=8.5, color=INK, linespacing=1.3)
        for c, picture in enumerate(row):
            x, y = left + 0.06 + c * (CELL + 0.06), base + cell_height - CELL
            axis = figure.add_axes((x / width, y / height, CELL / width, CELL / height))
            shown = picture[..., 0] if picture.shape[-1] == 1 else picture
            smooth = "nearest" if picture.shape[0] < 100 else "antialiased"
            axis.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation=smooth)
            axis.set_axis_off()
            if column_names and r == 0:
                axis.set_title(column_names[c], fontsize=8, color=QUIET, pad=3)
            if captions:
                below = (x + CELL / 2) / width, (y - 0.03) / height
                figure.text(*below, captions[r][c], ha="center", va="top", fontsize=7, color=QUIET, linespacing=1.15)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    write_atomic(path, buffer.getvalue())
