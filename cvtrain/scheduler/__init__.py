"""Learning rate as a pure function of the step; the `scheduler` group.

Nothing is stored but the plateau's counters, so a resumed run is at the right rate by construction.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """Where a run stands.

    Attributes:
        step: Optimizer steps taken, from 0.
        steps_per_epoch: Optimizer steps in an epoch.
        epochs: Epochs of the whole run.
    """

    step: int
    steps_per_epoch: int
    epochs: int


class Schedule:
    """A constant rate after a linear warm-up; subclasses change what comes after.

    Every rate is set anew at each step. Durations are epochs after the warm-up, whatever the length of the run; the
    others (`Cosine`, `Polynomial`, `OneCycle`) spread over all of its epochs, so more epochs stretch them.

    The warm-up rises from `lr / (warm-up steps + 1)` in equal stairs; the schedule proper sees the time that is left.

    Args:
        warmup_epochs: Epochs of linear warm-up; a fraction is allowed.
    """

    caption = "learning rate"
    """Title of the curve that is drawn before training."""

    def __init__(self, warmup_epochs: float = 0) -> None:
        self.warmup_epochs = warmup_epochs

    def lr(self, base_lr: float, clock: Clock) -> float:
        """Return the learning rate of the step that is about to be taken."""
        warmup = min(round(self.warmup_epochs * clock.steps_per_epoch), clock.epochs * clock.steps_per_epoch)
        total = max(1, clock.epochs * clock.steps_per_epoch - warmup)
        if clock.step < warmup:
            first = self.after_warmup(base_lr, 0, total, clock.steps_per_epoch)
            return first * (clock.step + 1) / (warmup + 1)
        return self.after_warmup(base_lr, clock.step - warmup, total, clock.steps_per_epoch)

    def after_warmup(self, base_lr: float, step: int, total: int, steps_per_epoch: int) -> float:
        """Return the rate at `step` of `total` steps after the warm-up."""
        return base_lr

    def end_epoch(self, improved: bool) -> None:
        """Hear whether the monitored metric improved; only `Plateau` listens."""

    def begin_phase(self) -> None:
        """Hear that the pictures change their size and the schedule starts anew; only `Plateau` listens."""

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must keep."""
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        """Take back what `state` returned."""


class Constant(Schedule):
    """The same rate throughout."""


class Step(Schedule):
    """Multiply by `gamma` every `step_epochs` (torch's StepLR)."""

    def __init__(self, step_epochs: int = 10, gamma: float = 0.5, warmup_epochs: float = 0) -> None:
        super().__init__(warmup_epochs)
        self.step_epochs, self.gamma = step_epochs, gamma

    def after_warmup(self, base_lr: float, step: int, total: int, steps_per_epoch: int) -> float:
        """Return the rate at `step`."""
        return base_lr * self.gamma ** (step // (self.step_epochs * steps_per_epoch))


class MultiStep(Schedule):
    """Multiply by `gamma` at each of `milestones_epochs` (torch's MultiStepLR). Source: He et al., CVPR 2016."""

    def __init__(
        self, milestones_epochs: Sequence[int] = (12, 18), gamma: float = 0.1, warmup_epochs: float = 0
    ) -> None:
        super().__init__(warmup_epochs)
        self.milestones_epochs, self.gamma = sorted(milestones_epochs), gamma

    def after_warmup(self, base_lr: float, step: int, total: int, steps_per_epoch: int) -> float:
        """Return the rate at `step`."""
        return float(base_lr * self.gamma ** bisect_right(self.milestones_epochs, step // steps_per_epoch))


class Exponential(Schedule):
    """Multiply by `gamma` in each epoch, a little at every step; torch's ExponentialLR at the epochs' beginnings."""

    def __init__(self, gamma: float = 0.9, warmup_epochs: float = 0) -> None:
        super().__init__(warmup_epochs)
        self.gamma = gamma

    def after_warmup(self, base_lr: float, step: int, total: int, steps_per_epoch: int) -> float:
        """Return the rate at `step`."""
        return float(base_lr * self.gamma ** (step / steps_per_epoch))


class Polynomial(Schedule):
    """Fall to zero as (1 - t)^`power`, step by step. Source: Chen et al., DeepLab, TPAMI 2018 (power 0.9)."""

    def __init__(self, power: float = 0.9, warmup_epochs: float = 0) -> None:
        super().__init__(warmup_epochs)
        self.power = power

    def after_warmup(self, base_lr: float, step: int, total: int, steps_per_epoch: int) -> float:
        """Return the rate at `step`."""
        return float(base_lr * max(0.0, 1.0 - step / total) ** self.power)


class Cosine(Schedule):
    """Half a cosine from the base rate to `min_lr`, step by step. Source: Loshchilov & Hutter, SGDR, ICLR 2017."""

    def __init__(self, min_lr: float = 0.0, warmup_epochs: float = 0) -> None:
        super().__init__(warmup_epochs)
        self.min_lr = min_lr

    def after_warmup(self, base_lr: float, step: int, total: int, steps_per_epoch: int) -> float:
        """Return the rate at `step`."""
        return _cosine(base_lr, self.min_lr, step / total)


class CosineRestarts(Schedule):
    """Half a cosine to `min_lr`, then again from the base rate, each `restart_factor` times as long as the one before.

    torch's CosineAnnealingWarmRestarts, moved at every step. Source: Loshchilov & Hutter, SGDR, ICLR 2017.

    Args:
        restart_epochs: Epochs of the first cosine.
        restart_factor: A whole number.
        min_lr: Where each ends.
        warmup_epochs: Epochs of linear warm-up, before the first only.
    """

    def __init__(
        self, restart_epochs: int = 10, restart_factor: int = 2, min_lr: float = 1e-6, warmup_epochs: float = 0
    ) -> None:
        super().__init__(warmup_epochs)
        self.restart_epochs, self.restart_factor, self.min_lr = restart_epochs, restart_factor, min_lr

    def after_warmup(self, base_lr: float, step: int, total: int, steps_per_epoch: int) -> float:
        """Return the rate at `step`."""
        length = self.restart_epochs * steps_per_epoch
        while step >= length:
            step -= length
            length *= self.restart_factor
        return _cosine(base_lr, self.min_lr, step / length)


class OneCycle(Schedule):
    """Cosine up from `lr/div_factor` in `pct_start` of the steps, then down to `lr/div_factor/final_div_factor`.

    The rate of torch's OneCycleLR (momentum is left alone). Source: Smith & Topin, "Super-convergence", 2018.
    """

    def __init__(
        self, pct_start: float = 0.3, div_factor: float = 25.0, final_div_factor: float = 1e4, warmup_epochs: float = 0
    ) -> None:
        super().__init__(warmup_epochs)
        self.pct_start, self.div_factor, self.final_div_factor = pct_start, div_factor, final_div_factor

    def after_warmup(self, base_lr: float, step: int, total: int, steps_per_epoch: int) -> float:
        """Return the rate at `step`."""
        start = base_lr / self.div_factor
        peak = self.pct_start * total - 1
        if step < peak:
            return _cosine(start, base_lr, step / peak)
        return _cosine(base_lr, start / self.final_div_factor, min(1.0, (step - peak) / max(1.0, total - 1 - peak)))


class Plateau(Schedule):
    """Multiply by `gamma` when the monitored metric has not improved for more than `plateau_epochs` epochs.

    It hears of improvement from the run's own monitor (`mode`, `min_delta`), as torch's ReduceLROnPlateau would.
    """

    caption = "learning rate without reductions: when the metric stalls is not known ahead"

    def __init__(
        self, gamma: float = 0.5, plateau_epochs: int = 5, min_lr: float = 0.0, warmup_epochs: float = 0
    ) -> None:
        super().__init__(warmup_epochs)
        self.gamma, self.plateau_epochs, self.min_lr = gamma, plateau_epochs, min_lr
        self._bad_epochs = 0
        self._reductions = 0

    def after_warmup(self, base_lr: float, step: int, total: int, steps_per_epoch: int) -> float:
        """Return the rate as it stands."""
        return max(base_lr * self.gamma**self._reductions, min(self.min_lr, base_lr))

    def end_epoch(self, improved: bool) -> None:
        """Count epochs without improvement and reduce when there are too many."""
        self._bad_epochs = 0 if improved else self._bad_epochs + 1
        if self._bad_epochs > self.plateau_epochs:
            self._reductions += 1
            self._bad_epochs = 0

    def begin_phase(self) -> None:
        """Start at the full rate."""
        self._bad_epochs = self._reductions = 0

    def state(self) -> dict[str, float]:
        """Return both counters."""
        return {"bad_epochs": self._bad_epochs, "reductions": self._reductions}

    def load_state(self, state: dict[str, float]) -> None:
        """Take back both counters."""
        self._bad_epochs, self._reductions = int(state["bad_epochs"]), int(state["reductions"])


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1.0 + math.cos(math.pi * fraction)) / 2.0
