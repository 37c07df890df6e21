"""Some pictures of a batch as contiguous planes, whatever the memory order of the batch, and back.

On a CPU NumPy copies the bytes channel by channel: torch takes twice as long to take pixels apart and together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.aug.ranges import to_device


def copy_pixels(source: Tensor, target: Tensor) -> None:
    """Copy uint8 `(n, C, H, W)` to `target` of the same shape and other strides."""
    for channel in range(source.shape[1]):
        if source.device.type == "cpu":
            np.copyto(target[:, channel].numpy(), source[:, channel].numpy())
        else:
            target[:, channel] = source[:, channel]


def on_rows(images: Tensor, rows: NDArray[np.int64], function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `function` to some samples.

    Args:
        images: uint8 `(B, C, H, W)`, any strides; left as it is.
        rows: Which samples.
        function: Maps contiguous uint8 `(len(rows), C, H, W)` to the same; may reuse it.

    Returns:
        `images` itself when `rows` is empty; else a copy with its strides.
    """
    if not len(rows):
        return images
    if images.device.type != "cpu":
        chosen = to_device(rows, images.device)
        return images.clone().index_copy_(0, chosen, function(images.index_select(0, chosen).contiguous()))
    result, planes = images.clone(), torch.empty((len(rows), *images.shape[1:]), dtype=torch.uint8)
    for channel in range(images.shape[1]):
        planes.numpy()[:, channel] = images.numpy()[rows, channel]
    planes = function(planes)
    for channel in range(images.shape[1]):
        result.numpy()[rows, channel] = planes.numpy()[:, channel]
    return result
