"""The augmentation of a run: operations on single pictures, then operations that mix a batch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.aug.geometric import RandomResizedCrop
from cvtrain.aug.ranges import number
from cvtrain.core.random import generator, sample_uniforms
from cvtrain.core.threads import one_thread
from cvtrain.core.types import BatchTransform, CropChooser, Draw, Preprocess, SampleTransform


@runtime_checkable
class Resizing(Protocol):
    """A sample operation that makes the model's input size itself, such as a random resized crop."""

    def to_size(self, images: Tensor, draw: Draw, img_size: int) -> Tensor:
        """Map uint8 `(B, C, H, W)` to `(B, C, img_size, img_size)`."""
        ...


@runtime_checkable
class Adapting(Protocol):
    """A sample operation that depends on the data's statistics."""

    def adapt(self, preprocess: Preprocess) -> None:
        """Take from `preprocess` what it needs."""
        ...


class Augmentation:
    """What a training batch goes through between the loader and the normalisation; evaluation never comes here.

    Args:
        sample: Operations on single pictures by name, applied in this order. The name keys the randomness, so that
            adding or removing one operation leaves the others' draws as they were. None leaves an operation out.
        batch: Operations that mix the batch by name, applied in this order. None leaves an operation out.
        eval_resize: Pictures are read at `img_size` × this; evaluation then crops the centre.
    """

    def __init__(
        self,
        sample: Mapping[str, SampleTransform | None] | None = None,
        batch: Mapping[str, BatchTransform | None] | None = None,
        eval_resize: float = 1.0,
    ) -> None:
        self.sample = {str(key): op for key, op in (sample or {}).items() if op is not None}
        self.batch = {str(key): op for key, op in (batch or {}).items() if op is not None}
        self.eval_resize = number("eval_resize", eval_resize, 1)
        # Asked once: a look at a protocol costs as much as the flip of 20 pictures.
        self._resizing = {key: op for key, op in self.sample.items() if isinstance(op, Resizing)}

    @property
    def crop(self) -> CropChooser | None:
        """The random resized crop that begins the augmentation, to be taken while pictures are read; else None."""
        key, first = next(iter(self.sample.items()), ("", None))
        return first.chooser(_stream(key)) if isinstance(first, RandomResizedCrop) else None

    def adapt(self, preprocess: Preprocess) -> None:
        """Tell the operations that ask for it about the data; to be called once, before training."""
        for op in self.sample.values():
            if isinstance(op, Adapting):
                op.adapt(preprocess)

    def samples(
        self, images: Tensor, indices: NDArray[np.int64], seed: int, epoch: int, img_size: int, cropped: bool = False
    ) -> Tensor:
        """Augment every picture by itself.

        Args:
            images: uint8 `(B, C, H, W)` of any strides; its memory may be used for the result.
            indices: `(B,)` positions in the training set.
            seed: The run's seed.
            epoch: Epoch number, from 0.
            img_size: Side of the model's input, in pixels, at most H.
            cropped: Whether `crop` was taken while the pictures were read, and is left out here.

        Returns:
            uint8 `(B, C, img_size, img_size)` on the device of `images`. A picture's result depends on
            (seed, epoch, its index) only, never on its batch. On a GPU the host does not wait for it.
        """
        operations = list(self.sample.items())[cropped and self.crop is not None :]
        with one_thread(images.device):
            for key, op in operations:
                draw, resizing = _Draw(seed, epoch, indices, key), self._resizing.get(key)
                images = op(images, draw) if resizing is None else resizing.to_size(images, draw, img_size)
        if images.shape[-2:] == (img_size, img_size):
            return images
        top, left = (images.shape[-2] - img_size) // 2, (images.shape[-1] - img_size) // 2
        return images[..., top : top + img_size, left : left + img_size]

    def mix(self, images: Tensor, targets: Tensor, seed: int, step: int, rank: int) -> tuple[Tensor, Tensor]:
        """Mix the samples of a batch.

        Args:
            images: Float `(B, C, H, W)`.
            targets: Float `(B, K)` probabilities.
            seed: The run's seed.
            step: Training step, counted over the whole run.
            rank: This process's rank.

        Returns:
            Images and targets of the same shapes; the very same tensors when there is nothing to mix.
        """
        if not self.batch:  # a generator costs as much as a layer of a tiny model
            return images, targets
        rng = generator(seed, "mix", step, rank)
        for op in self.batch.values():
            images, targets = op(images, targets, rng)
        return images, targets


class _Draw:
    """`draw` for one operation and one batch; a second call gives new numbers, not the same ones again."""

    def __init__(self, seed: int, epoch: int, indices: NDArray[np.int64], key: str) -> None:
        self._where = (seed, epoch, indices)
        self._key = key
        self._calls = 0

    def __call__(self, count: int) -> NDArray[np.float32]:
        self._calls += 1
        seed, epoch, indices = self._where
        stream = _stream(self._key, self._calls - 1)
        # Rounded up, so that the batches of an epoch ask for few tables.
        size = 1 << int(indices.max(initial=0)).bit_length()
        if size * count > _TABLE:
            return sample_uniforms(seed, epoch, indices, stream, count)
        return _table(seed, epoch, size, stream, count).take(indices, axis=0)


_TABLE = 2**17
"""How many numbers of an operation and epoch are drawn at once, 512 KiB: for a batch, calls cost more than numbers."""


@functools.lru_cache(maxsize=16)
def _table(seed: int, epoch: int, size: int, stream: str, count: int) -> NDArray[np.float32]:
    """Return `(size, count)`: what `sample_uniforms` gives the first `size` samples."""
    return sample_uniforms(seed, epoch, np.arange(size), stream, count)


def _stream(key: str, call: int = 0) -> str:
    return f"aug.{key}" if call == 0 else f"aug.{key}.{call}"
