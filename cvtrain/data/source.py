"""Pictures of one split by position: held in memory, resized as they are read, or decoded as they are read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from cvtrain.core.crops import resized
from cvtrain.core.threads import one_thread
from cvtrain.core.types import BILINEAR, CropChooser
from cvtrain.data.collection import Encoded, Files, Indices, Part
from cvtrain.data.picture import read_crop, read_picture
from cvtrain.data.pixels import resize_all

MEMORY_LIMIT = 2 << 30
"""Bytes up to which a data set is held in memory, resized, as a whole."""


class ArraySource:
    """Pictures in one tensor; the only source that can live on a device.

    Args:
        images: uint8 `(M, C, S, S)`; fastest with channels last in memory. May be a memory-mapped file.
        labels: `(N,)` int64 class numbers, or `(N, K)` uint8.
        names: N names for predictions.csv.
        positions: `(N,)` int64 which of the M pictures are meant; None means all, in order.
        paths: N paths of the files they come from, None where there are none.
    """

    def __init__(
        self,
        images: Tensor,
        labels: NDArray[np.int64],
        names: list[str],
        positions: Indices | None = None,
        paths: list[str] | None = None,
    ) -> None:
        self.pixels = images.permute(0, 2, 3, 1)
        self.labels = labels
        self.names = names
        self.positions = positions
        self.paths = paths

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Return how many bytes the N pictures take."""
        return len(self) * (self.pixels[0].nbytes if len(self.pixels) else 0)

    def read(self, indices: Indices) -> Tensor:
        """Return uint8 `(B, C, S, S)`, channels last in memory."""
        where = indices if self.positions is None else self.positions[indices]
        # Rows of contiguous memory: four to fifteen times as fast as selecting from planes.
        return self.pixels.index_select(0, torch.from_numpy(where)).permute(0, 3, 1, 2)

    def read_crops(self, indices: Indices, choose: CropChooser, seed: int, epoch: int, img_size: int) -> Tensor:
        """Return uint8 `(B, C, img_size, img_size)`: the boxes that `choose` names, on the CPU.

        No picture is copied in whole first.
        """
        where = indices if self.positions is None else self.positions[indices]
        pictures = self.pixels.permute(0, 3, 1, 2)
        boxes = choose.boxes(choose.draw(seed, epoch, indices), (pictures.shape[2], pictures.shape[3]))
        with one_thread():
            return resized(
                [
                    pictures[at : at + 1, :, top : top + rows, left : left + columns]
                    for at, (top, left, rows, columns) in zip(where.tolist(), boxes, strict=True)
                ],
                img_size,
            )


class ResizingSource:
    """Pictures in one array, resized at each reading: for sizes at which the whole set would not fit in memory.

    Args:
        pixels: uint8 `(N, H, W, C)`.
        labels: `(N,)` int64 class numbers.
        names: N names for predictions.csv.
        resize: Side of the square that is read, in pixels.
        interpolation: `bilinear` or `bicubic`.
    """

    def __init__(
        self,
        pixels: NDArray[np.uint8],
        labels: NDArray[np.int64],
        names: list[str],
        resize: int,
        interpolation: str = BILINEAR,
    ) -> None:
        self.labels = labels
        self.names = names
        self._pixels = pixels
        self._resize = resize
        self._interpolation = interpolation

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    def read(self, indices: Indices) -> Tensor:
        """Return uint8 `(B, C, resize, resize)`."""
        return resize_all(self._pixels[indices], self._resize, 0, self._interpolation)


class EncodedSource:
    """Pictures decoded as they are asked for.

    Args:
        part: N encoded pictures.
        channels: 1 for grey, 3 for RGB.
        resize: Side of the square that is read, in pixels.
        max_pixels: Largest width × height of a picture.
        interpolation: `bilinear` or `bicubic`; crops are bilinear.
    """

    def __init__(self, part: Part, channels: int, resize: int, max_pixels: int, interpolation: str = BILINEAR) -> None:
        if isinstance(part.pictures, np.ndarray):
            raise TypeError("an array needs no decoding")
        self.labels = part.labels
        self.names = part.names
        self.groups = part.groups
        self.pictures: Encoded = part.pictures
        self.channels = channels
        self.resize = resize
        self.max_pixels = max_pixels
        self.interpolation = interpolation

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    @property
    def paths(self) -> list[str] | None:
        """Return the N paths of pictures that are files of their own."""
        if not isinstance(self.pictures, Files):
            return None
        return [self.pictures.content(index) for index in range(len(self))]

    def read(self, indices: Indices) -> Tensor:
        """Return uint8 `(B, C, resize, resize)`, channels last in memory.

        Raises:
            DataError: A picture cannot be read; the message begins with its place.
        """
        return _stacked([self.read_one(int(index)) for index in indices])

    def read_one(self, index: int) -> Tensor:
        """Return uint8 `(C, resize, resize)`; errors as `read`."""
        content, place = self.pictures.content(index), self.pictures.place(index)
        return read_picture(
            content, self.resize, self.channels, self.max_pixels, place, interpolation=self.interpolation
        )

    def read_crops(self, indices: Indices, choose: CropChooser, seed: int, epoch: int, img_size: int) -> Tensor:
        """Return uint8 `(B, C, img_size, img_size)`: the box of each picture that `choose` names; errors as `read`."""
        uniforms = choose.draw(seed, epoch, indices)
        with one_thread():
            crops = [
                read_crop(
                    self.pictures.content(index),
                    lambda size, row=row: choose.boxes(uniforms[row : row + 1], size)[0],  # type: ignore[misc]
                    img_size,
                    self.channels,
                    self.max_pixels,
                    self.pictures.place(index),
                )
                for row, index in enumerate(indices.tolist())
            ]
        return _stacked(crops)


def array_source(
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    names: Sequence[str],
    resize: int,
    workers: int,
    interpolation: str = BILINEAR,
) -> ArraySource | ResizingSource:
    """Return a source of `pixels` at `resize`, in memory when that takes 2 GiB or less.

    Args:
        pixels: uint8 `(N, H, W, C)`.
        labels: `(N,)` int64 class numbers.
        names: N names for predictions.csv.
        resize: Side of the square that is read, in pixels.
        workers: Threads that resize.
        interpolation: `bilinear` or `bicubic`.
    """
    if len(pixels) * pixels.shape[-1] * resize * resize > MEMORY_LIMIT:
        return ResizingSource(pixels, labels, list(names), resize, interpolation)
    return ArraySource(resize_all(pixels, resize, workers, interpolation), labels, list(names))


def _stacked(images: list[Tensor]) -> Tensor:
    # Stacked as rows of channels, the layout they were decoded in; in a worker straight into memory that it shares.
    stacked: Tensor = default_collate([image.permute(1, 2, 0) for image in images])
    return stacked.permute(0, 3, 1, 2)
