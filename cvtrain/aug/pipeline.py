"""The augmentation of a run: operations on single pictures, then operations that mix a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.aug.ranges import number
from cvtrain.core.random import generator, sample_uniforms
from cvtrain.core.types import BatchTransform, Draw, SampleTransform


@runtime_checkable
class Resizing(Protocol):
    """A sample operation that makes the model's input size itself, such as a random resized crop."""

    def to_size(self, images: Tensor, draw: Draw, img_size: int) -> Tensor:
        """Map float `(B, C, H, W)` to `(B, C, img_size, img_size)`."""
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

    def samples(self, images: Tensor, indices: NDArray[np.int64], seed: int, epoch: int, img_size: int) -> Tensor:
        """Augment every picture by itself.

        Args:
            images: `(B, C, H, W)`, uint8 in 0..255 or float in 0..1; left as it is.
            indices: `(B,)` positions in the training set.
            seed: The run's seed.
            epoch: Epoch number, from 0.
            img_size: Side of the model's input, in pixels, at most H.

        Returns:
            float32 `(B, C, img_size, img_size)` in 0..1 on the device of `images`. A picture's result depends on
            (seed, epoch, its index) only, never on its batch.
        """
        images = images.float().div_(255.0) if images.dtype == torch.uint8 else images.float()
        for key, op in self.sample.items():
            draw = _Draw(seed, epoch, indices, key, images.device)
            images = op.to_size(images, draw, img_size) if isinstance(op, Resizing) else op(images, draw)
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
        rng = generator(seed, "mix", step, rank)
        for op in self.batch.values():
            images, targets = op(images, targets, rng)
        return images, targets


class _Draw:
    """`draw` for one operation and one batch; a second call gives new numbers, not the same ones again."""

    def __init__(self, seed: int, epoch: int, indices: NDArray[np.int64], stream: str, device: torch.device) -> None:
        self._where = (seed, epoch, indices)
        self._stream = stream
        self._device = device
        self._calls = 0

    def __call__(self, count: int) -> Tensor:
        stream = f"aug.{self._stream}" if self._calls == 0 else f"aug.{self._stream}.{self._calls}"
        self._calls += 1
        uniforms = torch.from_numpy(sample_uniforms(*self._where, stream, count))
        # A copy from pageable memory would make the host wait for the GPU.
        if self._device.type == "cuda":
            uniforms = uniforms.pin_memory()
        return uniforms.to(self._device, non_blocking=True)
