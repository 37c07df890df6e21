"""Where the time of a training run goes, phase by phase."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

STEP_PHASES = ("data", "augment", "forward", "backward", "optimizer")
"""What an optimizer step consists of, in order."""
EPOCH_PHASES = ("evaluate", "checkpoint")
"""What comes once an epoch."""
KEPT_EVENTS = 4096
"""CUDA intervals held before they are read, which waits for the device."""

_NOTHING = nullcontext()


class NoTimer:
    """Measures nothing; entering and leaving a phase costs a tenth of a microsecond."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return _NOTHING

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class TimeTable:
    """Mean times of a run's phases.

    Attributes:
        step: Seconds an optimizer step by phase; `other` is what no phase covers.
        epoch: Seconds an epoch by phase.
        steps: Optimizer steps measured.
    """

    step: dict[str, float]
    epoch: dict[str, float]
    steps: int

    def shares(self, steps_per_epoch: int) -> dict[str, float]:
        """Return each phase's share of an epoch of so many steps, 0..1; together 1."""
        parts = {name: value * steps_per_epoch for name, value in self.step.items()} | self.epoch
        total = max(sum(parts.values()), 1e-12)
        return {name: value / total for name, value in parts.items()}


@dataclass
class _Measured:
    """What was counted since the last reset; a phase inside another belongs to the inner one alone."""

    began: float
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    events: list[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def add(self, name: str, outer: str | None, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if outer is not None:
            self.seconds[outer] = self.seconds.get(outer, 0.0) - seconds


class PhaseTimer(NoTimer):
    """Adds up the time in each phase.

    A CPU is timed by its clock. On a GPU events are recorded around each phase, so that nothing waits: a phase counts
    what the device spent between them, `data` therefore only what the device stood idle for.

    Args:
        device: Where the run computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._device = device
        self._stack: list[str] = []
        self._measured = _Measured(time.perf_counter())

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return a context whose time counts for `name`."""
        return _Phase(self, name)

    def reset(self) -> None:
        """Forget what was measured and begin now; phases that are open count from here on."""
        self._settle()
        self._measured = _Measured(time.perf_counter())

    def table(self) -> TimeTable:
        """Return the means since the last reset; waits for a GPU."""
        self._settle()
        found = self._measured
        elapsed = time.perf_counter() - found.began
        steps, epochs = (max(1, found.counts.get(name, 0)) for name in ("optimizer", "evaluate"))
        other = max(0.0, elapsed - sum(found.seconds.values()))
        step = {name: found.seconds.get(name, 0.0) / steps for name in STEP_PHASES}
        epoch = {name: found.seconds.get(name, 0.0) / epochs for name in EPOCH_PHASES}
        return TimeTable({**step, "other": other / steps}, epoch, found.counts.get("optimizer", 0))

    def entered(self, name: str) -> None:
        """Note that a phase begins."""
        self._stack.append(name)

    def left(self, name: str, mark: float | torch.cuda.Event) -> None:
        """Note that the innermost phase, begun at `mark`, ends."""
        self._stack.pop()
        found, outer = self._measured, self._stack[-1] if self._stack else None
        found.counts[name] = found.counts.get(name, 0) + 1
        if isinstance(mark, float):
            found.add(name, outer, time.perf_counter() - max(mark, found.began))
            return
        found.events.append((name, outer, mark, self.mark()))  # type: ignore[arg-type]
        if len(found.events) >= KEPT_EVENTS:
            self._settle()

    def mark(self) -> float | torch.cuda.Event:
        """Return the time now, as the device tells it."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _settle(self) -> None:
        """Turn events into seconds."""
        found = self._measured
        if found.events:
            torch.cuda.synchronize(self._device)
        for name, outer, start, end in found.events:
            found.add(name, outer, start.elapsed_time(end) / 1000)
        found.events.clear()


class _Phase(AbstractContextManager[None]):
    def __init__(self, timer: PhaseTimer, name: str) -> None:
        self._timer = timer
        self._name = name
        self._mark: float | torch.cuda.Event = 0.0

    def __enter__(self) -> None:
        self._timer.entered(self._name)
        self._mark = self._timer.mark()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.left(self._name, self._mark)


class Profiler(PhaseTimer):
    """A timer that also records a trace of a few steps by `torch.profiler`, for chrome://tracing or Perfetto.

    The first steps warm up, the next are traced, and only what follows is timed: recording slows a step down.

    Args:
        device: Where the run computes.
        folder: The run folder; `trace.json.gz` is written there.
        total_steps: Optimizer steps that the run will take.
    """

    def __init__(self, device: torch.device, folder: Path, total_steps: int) -> None:
        super().__init__(device)
        self.path = folder / "trace.json.gz"
        self._first = min(5, total_steps // 4)
        self._last = self._first + max(1, min(5, total_steps // 4))
        self._steps = 0
        self._trace: torch.profiler.profile | None = None
        self._labels: list[AbstractContextManager[object]] = []
        if self._first == 0:
            self._begin()

    def entered(self, name: str) -> None:
        """Note that a phase begins, in the trace too."""
        super().entered(name)
        if self._trace is not None:
            label: AbstractContextManager[object] = torch.profiler.record_function(name)
            label.__enter__()
            self._labels.append(label)

    def left(self, name: str, mark: float | torch.cuda.Event) -> None:
        """Note that a phase ends; behind a step, start or finish the trace when it is time."""
        if self._labels:
            self._labels.pop().__exit__(None, None, None)
        super().left(name, mark)
        if name != "optimizer":
            return
        self._steps += 1
        if self._steps == self._first:
            self._begin()
        elif self._steps == self._last:
            self.close()
            self.reset()

    def close(self) -> None:
        """Write the trace, if one is being recorded."""
        trace, self._trace = self._trace, None
        self._labels.clear()
        if trace is not None:
            trace.stop()
            trace.export_chrome_trace(str(self.path))

    def _begin(self) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if self.cuda else [])]
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would complain about a GPU that is not there
        self._trace = torch.profiler.profile(activities=kinds)
        self._trace.start()
