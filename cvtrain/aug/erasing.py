"""Random erasing (Zhong et al. 2020, arXiv:1708.04896)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cvtrain.aug.boxes import DRAWS, random_boxes
from cvtrain.aug.ranges import interval, number
from cvtrain.core.types import Draw


def inside(box: tuple[Tensor, Tensor, Tensor, Tensor], size: tuple[int, int]) -> Tensor:
    """Return a `(B, 1, H, W)` bool mask, true inside the box.

    Args:
        box: top, left, height, width: `(B,)` int64 each, in pixels.
        size: H and W.
    """
    top, left, height, width = (part.view(-1, 1) for part in box)
    rows = torch.arange(size[0], device=top.device).view(1, -1)
    columns = torch.arange(size[1], device=top.device).view(1, -1)
    in_rows = (rows >= top) & (rows < top + height)
    in_columns = (columns >= left) & (columns < left + width)
    return (in_rows[:, :, None] & in_columns[:, None, :]).unsqueeze(1)


class RandomErasing:
    """Paint a random rectangle in one value.

    Args:
        prob: Share of the pictures that are erased.
        scale: Smallest and largest share of the area.
        ratio: Smallest and largest width/height.
        value: What is painted, in 0..1. A constant, mid-grey by default, so that a sample never depends on its batch.
    """

    def __init__(
        self,
        prob: float = 0.5,
        scale: Sequence[float] = (0.02, 0.33),
        ratio: Sequence[float] = (0.3, 3.3),
        value: float = 0.5,
    ) -> None:
        self.prob = number("prob", prob, 0, 1)
        self.scale = interval("scale", scale, 0, 1)
        self.ratio = interval("ratio", ratio, 1e-3)
        self.value = number("value", value, 0, 1)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map float `(B, C, H, W)` in 0..1 to the same."""
        uniforms = draw(1 + DRAWS)
        size = (images.shape[-2], images.shape[-1])
        mask = inside(random_boxes(uniforms[:, 1:], size, self.scale, self.ratio), size)
        chosen = (uniforms[:, 0] < self.prob).view(-1, 1, 1, 1)
        return images.masked_fill(mask & chosen, self.value)
