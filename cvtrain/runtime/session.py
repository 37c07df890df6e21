"""An artifact that runs in this process: prepares pictures as its file says, answers, and times itself."""

from __future__ import annotations

import contextlib
import gc
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvtrain.errors import WeightsError
from cvtrain.runtime.base import Loaded
from cvtrain.runtime.prepare import class_names, preparation

_INPUT_SEED = 0


class Session:
    """A `Running` in this process; it has answered one picture, so what is in the file fits together.

    Args:
        loaded: The artifact.
        path: Its file.
        before: `peak_mb` before it was loaded; NaN where memory is not to be told.
        closing: Called at the first `close`.

    Raises:
        WeightsError: The metadata are missing or damaged, or there is not one answer for each class.
    """

    def __init__(
        self, loaded: Loaded, path: Path, before: float = math.nan, closing: Callable[[], None] | None = None
    ) -> None:
        self.metadata, self.embedded = loaded.metadata, loaded.embedded
        self._forward = loaded.forward
        self._prepare = preparation(loaded.metadata, path)
        self._before = before
        self._closing = closing
        self._inputs: dict[int, NDArray[Any]] = {}
        names = class_names(loaded.metadata, path)
        shape = self.run(np.zeros((1, *self._prepare.shape), dtype=np.uint8)).shape
        if shape != (1, len(names)):
            raise WeightsError(
                f"{path} answers a picture with an array {shape}, not (1, {len(names)}) for its {len(names)} classes. "
                "Export it again."
            )

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pictures `(B, C, resize, resize)` to logits, or where `embedded` probabilities, `(B, K)`."""
        answer = self._forward(np.ascontiguousarray(images) if self.embedded else self._prepare(images))
        return np.ascontiguousarray(answer, dtype=np.float32)

    def time(self, batch: int, runs: int) -> list[float]:
        """Return the milliseconds of `runs` calls of the model on `batch` pictures that are prepared already."""
        pixels = self._input(batch)
        return clocked(lambda: self._forward(pixels), runs)

    def memory(self) -> float:
        """Return the peak of resident memory so far, in MB above `before`."""
        return peak_mb() - self._before

    def close(self) -> None:
        """Call `closing`, once."""
        closing, self._closing = self._closing, None
        if closing is not None:
            closing()

    def _input(self, batch: int) -> NDArray[Any]:
        if batch not in self._inputs:
            generator = np.random.default_rng(_INPUT_SEED)
            images = generator.integers(0, 256, (batch, *self._prepare.shape), dtype=np.uint8)
            self._inputs = {batch: images if self.embedded else self._prepare(images)}
        return self._inputs[batch]


def clocked(call: Callable[[], object], runs: int) -> list[float]:
    """Return the milliseconds of `runs` calls, without the garbage collector's."""
    times = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        # Unwatched: fetches the weights back into the cache from which others pushed them.
        call()
        for _ in range(runs):
            start = time.perf_counter_ns()
            call()
            times.append((time.perf_counter_ns() - start) / 1e6)
    finally:
        if collecting:
            gc.enable()
    return times


def forget_peak() -> None:
    """Let `peak_mb` begin anew with what this process takes now, where the system can do that (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Return the largest resident memory of this process so far, in MB (10^6 bytes)."""
    with contextlib.suppress(OSError):
        # Not ru_maxrss, which a process inherits from the one that started it.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
