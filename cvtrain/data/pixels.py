"""Pillow images and uint8 arrays to square tensors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cvtrain.core.types import BILINEAR


def resize_all(pixels: NDArray[np.uint8], resize: int, workers: int, interpolation: str = BILINEAR) -> Tensor:
    """Resize the short side and crop the centre.

    Args:
        pixels: uint8 `(N, H, W, C)`.
        resize: Side of the result, in pixels.
        workers: Threads; 0 or 1 means none.
        interpolation: As `square` has it.

    Returns:
        uint8 `(N, C, resize, resize)`, channels last in memory.
    """
    if pixels.shape[1:3] == (resize, resize):
        return torch.from_numpy(np.array(pixels, order="C")).permute(0, 3, 1, 2)
    # In NumPy: a tensor made in inference mode could not be written to from other threads.
    result = np.empty((len(pixels), resize, resize, pixels.shape[-1]), np.uint8)

    def fill(position: int) -> None:
        picture = pixels[position]
        # Pillow takes two or four channels for transparency, and no others.
        parts = [picture] if picture.shape[-1] == 3 else [picture[..., i] for i in range(picture.shape[-1])]
        resized = [np.asarray(square(Image.fromarray(part), resize, interpolation)) for part in parts]
        result[position] = resized[0] if picture.shape[-1] == 3 else np.stack(resized, axis=-1)

    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, range(len(pixels))))
    else:
        for position in range(len(pixels)):
            fill(position)
    return torch.from_numpy(result).permute(0, 3, 1, 2)


def square(image: Image.Image, resize: int, interpolation: str = BILINEAR) -> Image.Image:
    """Resize the short side to `resize` pixels, antialiased as Pillow does it, and crop the centre.

    Only the central square is resized, so that a picture of 20000 × 2 pixels never becomes a huge one on the way.

    Args:
        image: Of any size.
        resize: Side of the result, in pixels.
        interpolation: `bilinear` or `bicubic`.
    """
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if image.size == (resize, resize):
        return image
    return image.resize(
        (resize, resize), Image.Resampling[interpolation.upper()], box=(left, top, left + side, top + side)
    )


def to_tensor(image: Image.Image) -> Tensor:
    """Return an "L" or "RGB" image as uint8 `(C, H, W)`, channels last in memory."""
    array: NDArray[Any] = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
