"""The values that travel between layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.core.picture import BICUBIC as BICUBIC
from cvtrain.core.picture import BILINEAR as BILINEAR
from cvtrain.core.picture import INTERPOLATIONS as INTERPOLATIONS


@dataclass
class Batch:
    """Samples on their way to the model.

    Attributes:
        images: `(B, C, H, W)`; uint8 in 0..255 as read, float32 once augmented and normalised.
        targets: `(B,)` int64 class numbers as read, or `(B, K)` uint8 where a picture may have several; `(B, K)` float
            probabilities after mixing. Other tasks put what they need here; only `task/` and `data/` know which.
        indices: `(B,)` int64 positions in the split, the key of per-sample randomness and of predictions.csv.
        cropped: Whether the augmentation's random resized crop was taken while the pictures were read.
    """

    images: Tensor
    targets: Any
    indices: NDArray[np.int64]
    cropped: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Batch:
        """Copy to `device`; asynchronous when the memory is pinned."""
        return dataclasses.replace(
            self,
            images=self.images.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the model's input; stored in every checkpoint and export.

    Resize the short side to `resize`, crop the centre to `img_size`, scale to 0..1, subtract `mean`, divide by `std`.

    Attributes:
        img_size: Side of the square the model sees, in pixels.
        resize: Side of the square that is read, in pixels; larger than `img_size` when evaluation crops the centre.
        channels: 1 (grey), 3 (RGB) or more.
        mean: Mean a channel, of values in 0..1.
        std: Standard deviation a channel, of values in 0..1.
        interpolation: How it is resized, antialiased: one of `INTERPOLATIONS`.
    """

    img_size: int
    resize: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = BILINEAR

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of the model's input."""
        return self.channels, self.img_size, self.img_size

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {**dataclasses.asdict(self), "scale": 255.0, "layout": "NCHW"}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Preprocess:
        """Rebuild from `to_dict`'s JSON; raise KeyError, TypeError or ValueError when it is something else."""
        interpolation = str(values.get("interpolation", BILINEAR))
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {interpolation}")
        return Preprocess(
            img_size=int(values["img_size"]),
            resize=int(values["resize"]),
            channels=int(values["channels"]),
            mean=tuple(float(v) for v in values["mean"]),
            std=tuple(float(v) for v in values["std"]),
            interpolation=interpolation,
        )

    def centre_crop(self, images: Tensor) -> Tensor:
        """Crop `(B, C, resize, resize)` to the centre `(B, C, img_size, img_size)`; a no-op when they are equal."""
        margin = (images.shape[-1] - self.img_size) // 2
        return images[..., margin : margin + self.img_size, margin : margin + self.img_size]

    def normalize(self, images: Tensor) -> Tensor:
        """Turn uint8 `(B, C, H, W)` into the model's float32 input of the same shape and memory format."""
        batch, channels, height, width = images.shape
        if channels == 1 or not images.is_contiguous(memory_format=torch.channels_last):
            scale, shift = (values.view(1, -1, 1, 1) for values in _affine(self.mean, self.std, 1, images.device))
            return images.float().mul_(scale).add_(shift)
        # Rows of whole lines, whose factors repeat a pixel: seven times as fast on a CPU as factors a channel.
        scale, shift = _affine(self.mean, self.std, width, images.device)
        pixels = images.permute(0, 2, 3, 1).reshape(-1, width * channels)
        lines = torch.empty(pixels.shape, device=images.device)
        # On a CPU in parts that stay in its cache between the conversion and the arithmetic, which is one pass.
        rows = max(1, _CACHED_FLOATS // (width * channels)) if images.device.type == "cpu" else max(1, len(pixels))
        for part, source in zip(torch.split(lines, rows), torch.split(pixels, rows), strict=True):
            torch.addcmul(shift, part.copy_(source), scale, out=part)
        return lines.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def __call__(self, images: Tensor) -> Tensor:
        """Turn uint8 `(B, C, resize, resize)` pictures into the model's float32 `(B, C, img_size, img_size)` input."""
        return self.normalize(self.centre_crop(images))


_CACHED_FLOATS = 2**18
"""Floats that stay in a CPU core's second-level cache."""


@functools.cache
def _affine(mean: tuple[float, ...], std: tuple[float, ...], times: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return factors and summands for bytes, one a channel, the whole repeated `times`, on the device."""
    # Kept from run to run: a tensor made in inference mode could not be used in training.
    with torch.inference_mode(False):
        deviation = torch.tensor(std, dtype=torch.float64)
        scale, shift = 1 / (255 * deviation), -torch.tensor(mean, dtype=torch.float64) / deviation
        return scale.float().repeat(times).to(device), shift.float().repeat(times).to(device)


class Source(Protocol):
    """One split of a data set: labelled pictures by position."""

    labels: NDArray[np.int64]
    """`(N,)` class numbers; `(N, K)` of 0 and 1 where a picture may have several."""
    names: list[str]
    """`N` names for predictions.csv: a relative path, or the position as text."""

    def __len__(self) -> int:
        """Return N."""
        ...

    def read(self, indices: NDArray[np.int64]) -> Tensor:
        """Return uint8 `(B, C, resize, resize)`; safe to call from worker processes."""
        ...


@dataclass(frozen=True)
class DataSets:
    """A data set ready to be loaded: three disjoint splits, one class list frozen from train, one preprocessing.

    Attributes:
        name: Short name for logs.
        class_names: K names; a label is a position in this list.
        preprocess: What `Source.read` returns and the model expects.
        train: What the optimizer sees.
        val: What chooses the checkpoint.
        test: What produces the reported numbers; touched once.
        skipped: How many files were left out.
        notes: Sentences for the log: what was split, resized, skipped.
        bad: "place: reason" of each picture that was left out.
        multilabel: Whether a picture may have several labels, or none; then `Source.labels` is `(N, K)` of 0 and 1.
    """

    name: str
    class_names: list[str]
    preprocess: Preprocess
    train: Source
    val: Source
    test: Source
    skipped: int = 0
    notes: list[str] = field(default_factory=list)
    multilabel: bool = False
    bad: list[str] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        """Return K."""
        return len(self.class_names)

    def counts(self) -> dict[str, int]:
        """Return how many pictures each split holds."""
        return {
            "train": len(self.train),
            "val": len(self.val),
            "test": len(self.test),
            "skipped": self.skipped,
        }


Draw = Callable[[int], NDArray[np.float32]]
"""Per-sample randomness: `draw(n)` returns `(B, n)` float32 in [0, 1), on the host.

Parameters are made of it in NumPy, so that what to do with which picture is known without asking a GPU.
"""


class SampleTransform(Protocol):
    """An augmentation of single pictures, applied to a whole batch with parameters of each sample's own."""

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to the same, on the same device; `images` may be reused."""
        ...


class BatchTransform(Protocol):
    """An augmentation that mixes the samples of a batch."""

    def __call__(self, images: Tensor, targets: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Map images `(B, C, H, W)` and targets `(B, K)` float to the same shapes."""
        ...


Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels, inside the picture."""


class CropChooser(Protocol):
    """Where to crop pictures at random while they are read."""

    def draw(self, seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return `(B, n)` numbers for the samples `indices`, a pure function of the arguments."""
        ...

    def boxes(self, uniforms: NDArray[np.float32], size: tuple[int, int]) -> list[Box]:
        """Return a box for each row of `draw`, in pictures of `size` (height, width)."""
        ...
