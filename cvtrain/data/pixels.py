"""Arrays of many pictures to square tensors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.core.picture import BILINEAR, square_array


def resize_all(pixels: NDArray[np.uint8], resize: int, workers: int, interpolation: str = BILINEAR) -> Tensor:
    """Resize the short side and crop the centre.

    Args:
        pixels: uint8 `(N, H, W, C)`.
        resize: Side of the result, in pixels.
        workers: Threads; 0 or 1 means none.
        interpolation: `bilinear` or `bicubic`.

    Returns:
        uint8 `(N, C, resize, resize)`, channels last in memory.
    """
    if pixels.shape[1:3] == (resize, resize):
        return torch.from_numpy(np.array(pixels, order="C")).permute(0, 3, 1, 2)
    # In NumPy: a tensor made in inference mode could not be written to from other threads.
    result = np.empty((len(pixels), resize, resize, pixels.shape[-1]), np.uint8)

    def fill(position: int) -> None:
        result[position] = square_array(pixels[position], resize, interpolation)

    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, range(len(pixels))))
    else:
        for position in range(len(pixels)):
            fill(position)
    return torch.from_numpy(result).permute(0, 3, 1, 2)
