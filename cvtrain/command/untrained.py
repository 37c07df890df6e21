"""In place of a run's training: random pictures, for a model that has none."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvtrain.core.random import generator

log = logging.getLogger("cvtrain")

BATCHES, BATCH = 4, 16
"""Random pictures that ranges are calibrated on."""


class Untrained:
    """What compression may ask of a model without data: speed and size are what they are, accuracy means nothing.

    Args:
        shape: Channels, height and width of a picture.
        num_classes: K.
        seed: Of the pictures.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int, seed: int = 0) -> None:
        self._shape = shape
        self._classes = num_classes
        self._seed = seed

    def finetune(self, model: nn.Module, epochs: int, lr: float, teacher: nn.Module | None) -> None:
        """Leave `model` as it is, and say so."""
        if epochs:
            log.info("fine-tuning is left out: nothing is trained here")

    def evaluate(self, model: nn.Module) -> float:
        """Return 0: the model has learnt nothing."""
        return 0.0

    def backward(self, model: nn.Module, batches: int) -> None:
        """Add the gradients of a cross entropy to random classes."""
        draw = generator(self._seed, "classes")
        for _, images in zip(range(batches), self.calibration(), strict=False):
            labels = torch.from_numpy(draw.integers(0, self._classes, len(images)))
            functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]

    def calibration(self) -> Iterator[Tensor]:
        """Yield float32 pictures `(16, C, H, W)` of normal noise."""
        draw = generator(self._seed, "pictures")
        for _ in range(BATCHES):
            yield torch.from_numpy(draw.standard_normal((BATCH, *self._shape), dtype="float32"))
