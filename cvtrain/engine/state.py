"""Everything that changes while training, besides tensors owned by the model and the optimizer."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cvtrain.core import distributed

TERMS = ("loss", "acc")
"""What every task measures while it trains."""


@dataclass
class TrainState:
    """Everything that changes while training, besides tensors owned by the model and the optimizer.

    Attributes:
        sums: `(T + 3,)` float64 on the CPU, of the current epoch as of the last `read`: Σ term·n of each of the T
            terms, Σ gradient norm·n, Σ n, and the steps that counted. A step whose loss or gradient is not finite
            does not.
        halt: float32 scalar on the device: 1 after such a step, for the optimizer to stand still.
        terms: Names of the terms.
        epoch: Epochs finished.
        step: Optimizer steps taken.
        batch: Micro-batches taken in the current epoch; a resume starts there.
        history: One row of metrics an epoch, what results.csv shows.
        logged: `sums` at the last log within the epoch.
        logged_at: Seconds and pictures at the last log within the epoch, or at its begin.
        seconds: Time spent training, earlier parts of a resumed run included.
        waited: Seconds of the current epoch in which the loop waited for data.
        images: Pictures trained on, each as often as it was seen.
        parts: In how many parts each micro-batch is computed; more than 1 once memory has run out.
        unread: What `add` was given since the last `read`: whether to halt, terms and norms, on the device; samples.
    """

    sums: Tensor
    halt: Tensor
    terms: tuple[str, ...] = TERMS
    epoch: int = 0
    step: int = 0
    batch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    logged: list[float] = field(default_factory=list)
    logged_at: tuple[float, int] = (0.0, 0)
    seconds: float = 0.0
    waited: float = 0.0
    images: int = 0
    parts: int = 1
    unread: list[tuple[Tensor, int]] = field(default_factory=list)

    @staticmethod
    def new(device: torch.device, terms: tuple[str, ...] = TERMS) -> TrainState:
        """Return the state of a run that has not begun."""
        sums = torch.zeros(len(terms) + 3, dtype=torch.float64)
        return TrainState(sums, torch.zeros((), device=device), terms, logged=[0.0] * len(sums))

    def add(self, terms: list[Tensor], norms: list[Tensor], samples: int, sticky: bool) -> Tensor:
        """Add a step's results, unless they are not finite; nothing is copied to the host.

        Args:
            terms: T scalars float32, means over the step's samples.
            norms: Scalars float32: L2 norms of the gradient's parts.
            samples: How many samples the step had in this process.
            sticky: Whether no later step counts either.

        Returns:
            `halt`, the same in all processes.
        """
        factors, zero = _factors(1 + len(terms) + len(norms), self.halt.device)
        row = torch.stack([self.halt if sticky else zero, *terms, *norms])
        # The factors are 1 for the flag, and 0: 0·x is 0, but 0·inf and 0·nan are nan. A step of a tiny model has no
        # time for a longer test.
        self.halt = row.dot(factors).nan_to_num(1.0)
        if distributed.world_size() > 1:
            self.halt = distributed.largest(self.halt.clone())
            row[0] = self.halt
        self.unread.append((row, samples))
        return self.halt

    def read(self) -> list[float]:
        """Bring `sums` up to date and return them, which waits for the device."""
        if self.unread:
            numbers, sums, count = (
                torch.cat([row for row, _ in self.unread]).tolist(),
                self.sums.tolist(),
                len(self.terms),
            )
            for row, samples in self.unread:
                halted, *values = numbers[: len(row)]
                del numbers[: len(row)]
                if not halted and all(map(math.isfinite, values)):
                    measured = (*values[:count], math.hypot(*values[count:]))
                    step = (*(value * samples for value in measured), samples, 1)
                    sums = [before + now for before, now in zip(sums, step, strict=True)]
            self.sums.copy_(torch.tensor(sums, dtype=self.sums.dtype))
            self.unread.clear()
        return [float(value) for value in self.sums.tolist()]

    def totals(self) -> list[float]:
        """Return `sums` up to date and over all processes; only for a place that all of them come to."""
        if distributed.world_size() == 1:
            return self.read()
        *values, steps = self.rows().unbind(1)
        return [*(float(each.sum()) for each in values), float(steps.max())]

    def rows(self) -> Tensor:
        """Return `sums` up to date as a checkpoint keeps them, `(T + 3,)`, or those of W processes, `(W, T + 3)`."""
        self.read()
        return self.sums if distributed.world_size() == 1 else distributed.gather(self.sums[None])

    def load_sums(self, rows: Tensor) -> None:
        """Take back the `(T + 3,)` sums of a process by itself, or `(W, T + 3)` of W processes.

        With another number of processes than W the first has the total, so that the means stay what they were.
        """
        rows = rows.reshape(-1, len(self.sums))
        rank = distributed.rank()
        if len(rows) == distributed.world_size():
            self.sums.copy_(rows[rank])
        else:
            self.sums.copy_(rows.sum(0) if rank == 0 else torch.zeros_like(self.sums))
            self.sums[-1] = rows[0, -1]

    def means(self, sums: list[float] | None = None) -> dict[str, float]:
        """Return the epoch's running means by name, or those of the part that `sums` stands for."""
        sums = self.read() if sums is None else sums
        count = max(sums[-2], 1.0)
        return {
            f"train/{name}": value / count for name, value in zip((*self.terms, "grad_norm"), sums[:-2], strict=True)
        }

    def end_epoch(self, row: dict[str, float]) -> None:
        """Move on to the next epoch."""
        self.history.append(row)
        self.epoch += 1
        self.batch = 0
        self.logged = [0.0] * len(self.sums)
        self.sums.zero_()
        self.unread.clear()


@functools.cache
def _factors(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return 1 and behind it zeros, and a zero by itself."""
    with torch.inference_mode(False):
        factors = torch.zeros(length, device=device)
        factors[0] = 1.0
        return factors, factors.new_zeros(())
