"""Random rectangles of a given share of the picture, one a sample, without a loop or a host sync."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cvtrain.aug.ranges import stretch

TRIES = 10
DRAWS = 2 * TRIES + 2
"""How many uniform numbers `random_boxes` needs a sample."""


def random_boxes(
    uniforms: Tensor, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose one rectangle a sample: area uniform in `scale`, log of width/height uniform in `ratio`'s logs.

    Of ten candidates the first that fits is taken, as in Szegedy et al. 2015 (arXiv:1409.4842) and torchvision; when
    none fits, the first one is cut down to the picture.

    Args:
        uniforms: `(B, DRAWS)` in [0, 1).
        size: Height and width of the picture, in pixels.
        scale: Smallest and largest share of the picture's area.
        ratio: Smallest and largest width/height.

    Returns:
        top, left, height, width: `(B,)` int64 each, in pixels; at least 1 × 1 and inside the picture.
    """
    rows, columns = size
    area = stretch(uniforms[:, :TRIES], *scale) * (rows * columns)
    aspect = stretch(uniforms[:, TRIES : 2 * TRIES], math.log(ratio[0]), math.log(ratio[1])).exp()
    heights = (area / aspect).sqrt().round().long()
    widths = (area * aspect).sqrt().round().long()
    fits = (heights >= 1) & (heights <= rows) & (widths >= 1) & (widths <= columns)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    height = heights.gather(1, first).squeeze(1).clamp(1, rows)
    width = widths.gather(1, first).squeeze(1).clamp(1, columns)
    top = (uniforms[:, -2] * (rows - height + 1)).long()
    left = (uniforms[:, -1] * (columns - width + 1)).long()
    return top, left, height, width
