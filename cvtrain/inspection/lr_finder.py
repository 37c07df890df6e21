"""The learning-rate range test: how the loss behaves while the rate grows from nothing until it diverges.

Source: Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]

LOWEST, HIGHEST = 1e-6, 10.0
"""Rates between which the test grows exponentially, one factor a step."""
DIVERGED = 4.0
"""Times the smallest smoothed loss at which the test ends."""
SMOOTHING = 0.8
"""Weight of the past in the running mean that decides about the end."""
WINDOW = 0.05
"""Share of the steps in the centred mean that the rates are read from: a running mean would lag behind."""
BELOW_THE_MINIMUM = 2.0
"""The suggestion is the rate of the smallest loss divided by this."""


@dataclass(frozen=True)
class RangeTest:
    """What a range test found.

    Attributes:
        lrs: `(n,)` rates, ascending.
        losses: `(n,)` loss of the step that was then taken with the rate; the last may be infinite.
        smoothed: `(n,)` centred mean of the losses.
        steepest: Rate at which the smoothed loss falls fastest in the logarithm of the rate.
        lowest: Rate of the smallest smoothed loss.
        diverged: Rate at which the test ended; None when it did not diverge.
    """

    lrs: Curve
    losses: Curve
    smoothed: Curve
    steepest: float
    lowest: float
    diverged: float | None

    @property
    def suggestion(self) -> float:
        """Return half the rate of the smallest loss, rounded to two digits.

        A tenth of it, the usual rule, is meant for a constant rate: under a schedule that warms up the rate is a peak.
        """
        return float(f"{self.lowest / BELOW_THE_MINIMUM:.1e}")

    @property
    def falls(self) -> bool:
        """Return whether the loss fell by more than the noise of its first quarter; else the rates mean little."""
        start = self.smoothed[: max(1, len(self.smoothed) // 4)]
        return float(start.mean() - self.smoothed.min()) > 3 * float(start.std())


def range_test(step: Callable[[float], float], steps: int) -> RangeTest:
    """Take steps at growing rates until the loss diverges.

    Args:
        step: Takes one training step at the rate that it is given, and returns the loss before it.
        steps: How many rates to try.
    """
    lrs = np.geomspace(LOWEST, HIGHEST, steps)
    losses: list[float] = []
    mean, best, diverged = 0.0, math.inf, None
    for i, lr in enumerate(lrs.tolist()):
        loss = step(lr)
        losses.append(loss)
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        level = mean / (1 - SMOOTHING ** (i + 1))
        best = min(best, level)
        if not math.isfinite(loss) or level > DIVERGED * best:
            diverged = lr
            break
    return _read(lrs[: len(losses)], np.array(losses), diverged, steps)


def _read(lrs: Curve, losses: Curve, diverged: float | None, steps: int) -> RangeTest:
    known = np.isfinite(losses)
    finite = np.where(known, losses, np.max(losses[known], initial=1.0))
    half = max(1, round(WINDOW * steps)) // 2
    padded = np.pad(finite, half, mode="edge")
    smoothed = np.convolve(padded, np.full(2 * half + 1, 1 / (2 * half + 1)), mode="valid")
    lowest = int(smoothed.argmin())
    slope = np.gradient(smoothed[: lowest + 1], np.log(lrs[: lowest + 1])) if lowest else np.zeros(1)
    return RangeTest(lrs, losses, smoothed, float(lrs[int(slope.argmin())]), float(lrs[lowest]), diverged)
