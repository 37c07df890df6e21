"""Pictures by position: held in memory, or resized as they are read."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

MEMORY_LIMIT = 2 << 30
"""Bytes up to which a data set is held in memory, resized, as a whole."""


class ArraySource:
    """Pictures in one tensor; the only source that can live on a device.

    Args:
        images: uint8 `(N, C, S, S)`.
        labels: `(N,)` int64 class numbers.
        names: N names for predictions.csv.
    """

    def __init__(self, images: Tensor, labels: NDArray[np.int64], names: list[str]) -> None:
        self.images = images
        self.labels = labels
        self.names = names

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    def read(self, indices: NDArray[np.int64]) -> Tensor:
        """Return uint8 `(B, C, S, S)`."""
        return self.images[torch.from_numpy(indices)]


class ResizingSource:
    """Pictures in one array, resized at each reading: for sizes at which the whole set would not fit in memory.

    Args:
        pixels: uint8 `(N, H, W, C)`.
        labels: `(N,)` int64 class numbers.
        names: N names for predictions.csv.
        resize: Side of the square that is read, in pixels.
    """

    def __init__(self, pixels: NDArray[np.uint8], labels: NDArray[np.int64], names: list[str], resize: int) -> None:
        self.labels = labels
        self.names = names
        self._pixels = pixels
        self._resize = resize

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    def read(self, indices: NDArray[np.int64]) -> Tensor:
        """Return uint8 `(B, C, resize, resize)`."""
        return resize_all(self._pixels[indices], self._resize, workers=0)


def array_source(
    pixels: NDArray[np.uint8], labels: NDArray[np.int64], names: Sequence[str], resize: int, workers: int
) -> ArraySource | ResizingSource:
    """Return a source of `pixels` at `resize`, in memory when that takes 2 GiB or less.

    Args:
        pixels: uint8 `(N, H, W, C)`.
        labels: `(N,)` int64 class numbers.
        names: N names for predictions.csv.
        resize: Side of the square that is read, in pixels.
        workers: Threads that resize.
    """
    if len(pixels) * pixels.shape[-1] * resize * resize > MEMORY_LIMIT:
        return ResizingSource(pixels, labels, list(names), resize)
    return ArraySource(resize_all(pixels, resize, workers), labels, list(names))


def resize_all(pixels: NDArray[np.uint8], resize: int, workers: int) -> Tensor:
    """Resize the short side and crop the centre.

    Args:
        pixels: uint8 `(N, H, W, C)`.
        resize: Side of the result, in pixels.
        workers: Threads; 0 or 1 means none.

    Returns:
        uint8 `(N, C, resize, resize)`.
    """
    if pixels.shape[1:3] == (resize, resize):
        return torch.from_numpy(np.array(pixels.transpose(0, 3, 1, 2), order="C"))
    result = torch.empty((len(pixels), pixels.shape[-1], resize, resize), dtype=torch.uint8)

    def fill(position: int) -> None:
        picture = pixels[position]
        image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
        result[position] = to_tensor(square(image, resize))

    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, range(len(pixels))))
    else:
        for position in range(len(pixels)):
            fill(position)
    return result


def square(image: Image.Image, resize: int) -> Image.Image:
    """Resize the short side to `resize` pixels (Pillow's antialiased bilinear) and crop the centre.

    Only the central square is resized, so that a picture of 20000 × 2 pixels never becomes a huge one on the way.
    """
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if image.size == (resize, resize):
        return image
    return image.resize((resize, resize), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def to_tensor(image: Image.Image) -> Tensor:
    """Return an "L" or "RGB" image as uint8 `(C, H, W)`."""
    array: NDArray[Any] = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
