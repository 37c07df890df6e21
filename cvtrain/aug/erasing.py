"""Random erasing (Zhong et al. 2020, arXiv:1708.04896)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.aug.boxes import DRAWS, Boxes, random_boxes
from cvtrain.aug.ranges import interval, number, pixels_of, to_device
from cvtrain.core.types import Draw, Preprocess


def erase(images: Tensor, chosen: NDArray[np.bool_], boxes: Boxes, colour: NDArray[np.uint8]) -> Tensor:
    """Paint a box of the `chosen` `(B,)` of uint8 `images` `(B, C, H, W)`, in place on a CPU.

    Args:
        images: The pictures.
        chosen: Which of them.
        boxes: One for each of all B.
        colour: `(C,)`, or `(1,)` for all channels alike, in 0..255.
    """
    if images.device.type == "cpu":
        pixels, each = pixels_of(images), boxes.each()
        for position in np.flatnonzero(chosen).tolist():
            top, left, height, width = each[position]
            pixels[position, top : top + height, left : left + width] = colour
        return images
    return erase_batched(images, chosen, boxes, colour)


def erase_batched(images: Tensor, chosen: NDArray[np.bool_], boxes: Boxes, colour: NDArray[np.uint8]) -> Tensor:
    """Do what `erase` does without a loop, for devices where each step of one is a launch."""
    # A picture that is not chosen gets a box without height.
    borders = np.stack([boxes.top, boxes.top + boxes.height * chosen, boxes.left, boxes.left + boxes.width])
    top, bottom, left, right = to_device(borders, images.device).unsqueeze(-1)
    rows = torch.arange(images.shape[-2], device=images.device)
    columns = torch.arange(images.shape[-1], device=images.device)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    mask = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return torch.where(mask, to_device(colour, images.device).view(1, -1, 1, 1), images)


class RandomErasing:
    """Paint a random rectangle in one colour.

    Args:
        prob: Share of the pictures that are erased.
        scale: Smallest and largest share of the area.
        ratio: Smallest and largest width/height.
        value: What is painted, in 0..1. None is the mean colour of the data, once `adapt` has told it, and mid-grey
            until then: a constant, so that a sample never depends on its batch.
    """

    def __init__(
        self,
        prob: float = 0.5,
        scale: Sequence[float] = (0.02, 0.33),
        ratio: Sequence[float] = (0.3, 3.3),
        value: float | None = None,
    ) -> None:
        self.prob = number("prob", prob, 0, 1)
        self.scale = interval("scale", scale, 0, 1)
        self.ratio = interval("ratio", ratio, 1e-3)
        self.value = None if value is None else number("value", value, 0, 1)
        self._colour = _levels([0.5 if self.value is None else self.value])

    def adapt(self, preprocess: Preprocess) -> None:
        """Paint in the mean colour of the data unless a value was given."""
        if self.value is None:
            self._colour = _levels(preprocess.mean)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to the same."""
        uniforms = draw(1 + DRAWS)
        boxes = random_boxes(uniforms[:, 1:], (images.shape[-2], images.shape[-1]), self.scale, self.ratio)
        return erase(images, uniforms[:, 0] < self.prob, boxes, self._colour)


def _levels(values: Sequence[float]) -> NDArray[np.uint8]:
    return np.rint(np.array(values) * 255.0).astype(np.uint8)
