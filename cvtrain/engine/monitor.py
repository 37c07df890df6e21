"""Which epoch is the best, and when to stop waiting for a better one."""

from __future__ import annotations

import math
from collections.abc import Sequence


class Monitor:
    """Watches one metric.

    Args:
        name: Key of an epoch's row, such as `val/acc`.
        mode: `max` or `min`.
        patience: Epochs without improvement before the run stops; None: never.
        min_delta: Smallest change that counts.
    """

    def __init__(self, name: str, mode: str, patience: int | None = None, min_delta: float = 0.0) -> None:
        self.name, self.mode, self.patience, self.min_delta = name, mode, patience, min_delta
        self.best: float | None = None
        self.best_epoch = -1
        self.best_row: dict[str, float] = {}
        self.bad_epochs = 0
        self.reference: float | None = None  # the last real improvement, what min_delta is measured from

    @property
    def exhausted(self) -> bool:
        """Return whether patience has run out."""
        return self.patience is not None and self.bad_epochs >= self.patience

    def update(self, row: dict[str, float], epoch: int) -> bool:
        """Return whether `row` is the best so far; NaN never is.

        Of equal epochs the later one is the best, since it has trained longer; patience waits for a real improvement.
        """
        value = row[self.name]
        sign = 1.0 if self.mode == "max" else -1.0
        is_best = math.isfinite(value) and (self.best is None or sign * (value - self.best) >= 0)
        gain = math.inf if self.reference is None else sign * (value - self.reference)
        if is_best and gain > self.min_delta:
            self.reference, self.bad_epochs = value, 0
        else:
            self.bad_epochs += 1
        if is_best:
            self.best, self.best_epoch, self.best_row = value, epoch, dict(row)
        return is_best

    def replay(self, history: Sequence[dict[str, float]]) -> None:
        """Take in the rows of a run that goes on: what is best follows from them, and is stored nowhere else."""
        for epoch, row in enumerate(history):
            self.update(row, epoch)
