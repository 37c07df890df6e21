"""Boxes of pictures, resized on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def resized(boxes: Sequence[Tensor], size: int) -> Tensor:
    """Resize boxes of any sizes to one, bilinearly with antialiasing.

    Args:
        boxes: uint8 `(1, C, h, w)` each, on the CPU; fastest as views of pictures with channels last in memory.
        size: Side of the result, in pixels.

    Returns:
        uint8 `(len(boxes), C, size, size)`, channels last in memory.
    """
    shape = (len(boxes), boxes[0].shape[1], size, size)
    result = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    for box, place in zip(boxes, torch.split(result, 1), strict=True):
        # torch would make the same copy, but fail on a box that is contiguous in planes.
        rows = box.contiguous(memory_format=torch.channels_last)
        # What F.interpolate calls, which cannot write into a given tensor.
        torch.ops.aten._upsample_bilinear2d_aa.out(rows, (size, size), False, None, None, out=place)
    return result
