"""Pictures without colour."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cvtrain.aug.planes import on_rows
from cvtrain.aug.ranges import number
from cvtrain.core.types import Draw


def luma(images: Tensor) -> Tensor:
    """Return the ITU-R BT.601 luma of RGB uint8 `(n, 3, H, W)`: float whole levels `(n, 1, H, W)`, cut off."""
    # No fused multiply-add: a vector's remainder is rounded otherwise than the vectors.
    red, green, blue = (images[:, k : k + 1].float().mul_(weight) for k, weight in enumerate((0.2989, 0.587, 0.114)))
    return red.add_(green).add_(blue).floor_()


class Greyscale:
    """Take the colour out of RGB pictures at random, and keep the three channels; other pictures stay.

    Args:
        prob: Share of the pictures that turn grey.
    """

    def __init__(self, prob: float = 0.1) -> None:
        self.prob = number("prob", prob, 0, 1)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to the same."""
        rows = np.flatnonzero(draw(1)[:, 0] < self.prob)
        if images.shape[1] != 3:
            return images
        return on_rows(images, rows, lambda chosen: luma(chosen).to(torch.uint8).expand_as(chosen))
