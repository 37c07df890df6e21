"""Random rectangles of a given share of the picture, one a sample."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cvtrain.aug.ranges import stretch

TRIES = 10
DRAWS = 2 * TRIES + 2
"""How many uniform numbers `random_boxes` needs a sample."""


class Boxes(NamedTuple):
    """One box a sample: `(B,)` int64 each, in pixels, inside the picture."""

    top: NDArray[np.int64]
    left: NDArray[np.int64]
    height: NDArray[np.int64]
    width: NDArray[np.int64]

    def each(self) -> list[tuple[int, int, int, int]]:
        """Return the boxes one by one as (top, left, height, width)."""
        return list(zip(*(part.tolist() for part in self), strict=True))


def random_boxes(
    uniforms: NDArray[np.float32], size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> Boxes:
    """Choose one rectangle a sample: area uniform in `scale`, log of width/height uniform in `ratio`'s logs.

    Of ten candidates the first that fits is taken, as in Szegedy et al. 2015 (arXiv:1409.4842) and torchvision; when
    none fits, the first one is cut down to the picture.

    Args:
        uniforms: `(B, DRAWS)` in [0, 1).
        size: Height and width of the picture, in pixels.
        scale: Smallest and largest share of the picture's area.
        ratio: Smallest and largest width/height.

    Returns:
        The boxes; at least 1 × 1.
    """
    rows, columns = size
    area = stretch(uniforms[:, :TRIES], *scale) * np.float32(rows * columns)
    aspect = np.exp(stretch(uniforms[:, TRIES : 2 * TRIES], math.log(ratio[0]), math.log(ratio[1])))
    heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    fits = (heights >= 1) & (heights <= rows) & (widths >= 1) & (widths <= columns)
    first = (np.arange(len(uniforms)), fits.argmax(axis=1))
    height, width = heights[first].clip(1, rows), widths[first].clip(1, columns)
    top = (uniforms[:, -2] * (rows - height + 1).astype(np.float32)).astype(np.int64)
    left = (uniforms[:, -1] * (columns - width + 1).astype(np.float32)).astype(np.int64)
    return Boxes(top, left, height, width)
