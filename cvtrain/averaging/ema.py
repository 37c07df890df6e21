"""Exponential moving average."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cvtrain.averaging.base import WeightAverage


class Ema(WeightAverage):
    """Average that forgets: `average = d · average + (1 - d) · weights`.

    The first update copies. After t of them d is the smaller of `decay ** every_steps` and (1 + t)/(10 + t), so that
    the average always spans about the last tenth of the training so far, and a short run is not held back by weights
    from its beginning.

    Source: Polyak & Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the warm-up is that of
    TensorFlow's `ExponentialMovingAverage(num_updates=…)`.

    Args:
        decay: Weight of the past for one optimizer step, in 0..1; 0.999 spans about 1000 steps.
        every_steps: Optimizer steps between updates; the span in steps stays the same.
    """

    def __init__(self, decay: float = 0.999, every_steps: int = 1) -> None:
        super().__init__()
        self.decay = decay
        self.every_steps = every_steps

    def update(self, model: nn.Module, step: int, steps_per_epoch: int, epochs: int) -> None:
        """Take in the weights after each `every_steps`-th optimizer step; see `NoAveraging.update`."""
        if (step + 1) % self.every_steps:
            return
        decay = min(self.decay**self.every_steps, (1 + self.count) / (10 + self.count)) if self.count else 0.0
        self._blend(get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
