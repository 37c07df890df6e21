"""Stochastic weight averaging."""

from __future__ import annotations

import math

from torch import nn
from torch.optim.swa_utils import get_swa_multi_avg_fn

from cvtrain.averaging.base import WeightAverage


class Swa(WeightAverage):
    """Equal average of the weights at the end of each of the last epochs.

    Source: Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018.

    Args:
        start: Share of the epochs that go by before the first one counts, at least 0 and below 1.
    """

    def __init__(self, start: float = 0.75) -> None:
        super().__init__()
        self.start = start

    def update(self, model: nn.Module, step: int, steps_per_epoch: int, epochs: int) -> None:
        """Take in the weights after the last step of an epoch that counts; see `NoAveraging.update`."""
        if (step + 1) % steps_per_epoch:
            return
        if (step + 1) // steps_per_epoch <= math.floor(self.start * epochs + 1e-9):
            self.count = 0  # a run that was made longer: what counted as its end is its middle now
            return
        self._blend(get_swa_multi_avg_fn())  # type: ignore[no-untyped-call]
