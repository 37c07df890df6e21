"""`debug=overfit`: a model that cannot learn one batch by heart will not learn a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from contextlib import closing

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cvtrain.core.types import Batch
from cvtrain.engine.monitor import Monitor
from cvtrain.engine.parts import Loader
from cvtrain.engine.run import TrainRun
from cvtrain.errors import GateError

STEPS = 30
"""Steps between two looks at the batch in evaluation mode."""
LEARNT = 0.05
"""Loss below which the batch counts as learnt by heart."""


class OneBatch:
    """A loader that knows the first training batch only, for training and evaluation alike.

    Args:
        loader: Gives the batch.
        steps: How often an epoch shows it.
    """

    def __init__(self, loader: Loader, steps: int = STEPS) -> None:
        self.steps_per_epoch = steps
        self._loader = loader
        self._batches: dict[int | None, Batch] = {}

    def train_batches(self, epoch: int, start: int = 0, img_size: int | None = None) -> Generator[Batch, None, None]:
        """Yield the batch `steps - start` times."""
        for _ in range(start, self.steps_per_epoch):
            yield self._batch(img_size)

    def batch_total(self, number: int) -> int:
        """Return how many samples the batch has over all processes."""
        return self._loader.batch_total(0)

    def eval_batches(self, split: str, *, limit: int | None = None) -> Generator[Batch, None, None]:
        """Yield the batch once, whatever the split."""
        yield self._batch(None)

    def names(self, indices: NDArray[np.int64]) -> list[str]:
        """Return what the pictures are called."""
        return self._loader.names(indices)

    def _batch(self, img_size: int | None) -> Batch:
        if img_size not in self._batches:
            with closing(self._loader.train_batches(0, 0, img_size)) as batches:
                self._batches[img_size] = next(batches)
        batch = self._batches[img_size]
        return dataclasses.replace(batch, images=batch.images.clone())  # an augmentation may write into it


class UntilLearnt(Monitor):
    """Ends the run as soon as the batch is learnt."""

    def __init__(self) -> None:
        super().__init__("train/loss", "min")
        self.learnt = False

    @property
    def exhausted(self) -> bool:
        """Return whether the batch is learnt, also as evaluation sees it."""
        return self.learnt

    def update(self, row: dict[str, float], epoch: int) -> bool:
        """Look at an epoch's row."""
        self.learnt = row["train/loss"] <= LEARNT and row["val/acc"] == 1.0
        return super().update(row, epoch)


def prepare(run: TrainRun) -> None:
    """Let a run that has not begun train on one batch, without dropout, until it is learnt."""
    run.loader = OneBatch(run.loader)
    run.monitor = UntilLearnt()
    for module in run.model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def verdict(run: TrainRun) -> str:
    """Return what was found.

    Raises:
        GateError: The batch was not learnt; the message says what to look at.
    """
    history, steps = run.state.history, run.state.step
    last, lowest = history[-1], min(row["train/loss"] for row in history)
    found = f"loss {last['train/loss']:.4f}, accuracy {100 * last['val/acc']:.1f} % in evaluation mode"
    if last["train/loss"] <= LEARNT and last["val/acc"] == 1.0:
        return f"debug=overfit PASSED: one batch is learnt by heart after {steps} steps: {found}"
    if last["train/loss"] <= LEARNT:
        advice = (
            "Training mode is right and evaluation mode is wrong: look at batch norm (its momentum and running "
            "statistics) and at layers that work in training only."
        )
    elif lowest > 0.9 * history[0]["train/loss"] and lowest > LEARNT:
        advice = (
            "The loss hardly moves: cvtrain inspect what=lr finds a rate; see that finetune freezes nothing and "
            "that equal pictures have equal labels (cvtrain check)."
        )
    else:
        advice = (
            "The loss falls, but not to the end: give it more epochs, or a learning rate by cvtrain inspect what=lr."
        )
    raise GateError(f"debug=overfit FAILED: one batch is not learnt by heart after {steps} steps: {found}\n{advice}")
