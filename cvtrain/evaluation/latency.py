"""How long artifacts take, measured in turns so that a slow moment of the machine hits all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cvtrain.core.artifact import Artifact
from cvtrain.runtime.base import Running, Start

TURN = 5
"""Timed calls of an artifact before it is the next one's turn."""
LEAST_RUNS = 5
"""Timed calls that even the slowest artifact gets."""
STABLE = 0.05
"""Largest change between the medians of two windows of a warm-up that is over."""
MAX_WINDOWS = 20
_WINDOW_MS = 200.0


class Timed(Protocol):
    """What of a `Running` is needed here."""

    def time(self, batch: int, runs: int) -> list[float]:
        """Return the milliseconds of `runs` calls of the model on `batch` prepared pictures."""
        ...


@dataclass(frozen=True)
class Latency:
    """Timed calls of one artifact.

    Attributes:
        batch: Pictures a call.
        milliseconds: Of each call, in the order they were made; not empty.
    """

    batch: int
    milliseconds: tuple[float, ...]

    @property
    def p50(self) -> float:
        """Return the median in milliseconds."""
        return self._percentile(50)

    @property
    def p95(self) -> float:
        """Return the 95th percentile in milliseconds."""
        return self._percentile(95)

    @property
    def iqr(self) -> float:
        """Return the distance between the quartiles in milliseconds."""
        return self._percentile(75) - self._percentile(25)

    @property
    def throughput(self) -> float:
        """Return pictures a second, at the median."""
        return 1000 * self.batch / self.p50

    def _percentile(self, percent: float) -> float:
        return float(np.percentile(self.milliseconds, percent))


@contextmanager
def running(artifacts: Iterable[Artifact], start: Start) -> Iterator[list[Running]]:
    """Start all artifacts, which load side by side, and close them at the end."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(start(artifact))) for artifact in artifacts]


def measure(workers: Sequence[Timed], batch: int, runs: int = 60, seconds: float = 10.0) -> list[Latency]:
    """Time the model calls of artifacts in short turns, each after a warm-up until its times are stable.

    Args:
        workers: What to time.
        batch: Pictures a call, 1 or more.
        runs: Timed calls of each, 1 or more.
        seconds: About how long the timed calls of one may take in all, and its warm-up: a slow one gets fewer, but
            `LEAST_RUNS`.

    Returns:
        One for each worker.

    Raises:
        CvtrainError: One cannot be loaded or fails, or its process has died.
    """
    counts = []
    for worker in workers:
        fitting = int(seconds * 1000 / max(warm_up(worker, batch, seconds), 1e-6))
        counts.append(min(runs, max(LEAST_RUNS, fitting)))
    times: list[list[float]] = [[] for _ in workers]
    while any(len(measured) < count for measured, count in zip(times, counts, strict=True)):
        for worker, measured, count in zip(workers, times, counts, strict=True):
            if len(measured) < count:
                measured.extend(worker.time(batch, min(TURN, count - len(measured))))
    return [Latency(batch, tuple(measured)) for measured in times]


def warm_up(worker: Timed, batch: int, seconds: float) -> float:
    """Run a worker until the medians of two windows that follow each other agree within `STABLE`.

    Args:
        worker: What to run.
        batch: Pictures a call.
        seconds: About how long at most; also at most `MAX_WINDOWS` windows.

    Returns:
        The last median in milliseconds.
    """
    median = worker.time(batch, 1)[0]
    spent = 2 * median
    for _ in range(MAX_WINDOWS):
        calls = max(1, min(10, int(_WINDOW_MS / max(median, 1e-6))))
        window = worker.time(batch, calls)
        before, median = median, statistics.median(window)
        spent += sum(window) + median
        if abs(median - before) <= STABLE * before or spent > 1000 * seconds:
            break
    return median
