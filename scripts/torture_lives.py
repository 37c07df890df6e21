"""Lives of a training run: forked from a warm process, watched, killed, and compared with an uninterrupted one.

The parent imports everything, computes nothing and stays single-threaded; each life is a fork of it that goes through
`cvtrain.command.job.execute`. Pictures are not drawn: Matplotlib takes ten times as long as the training.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401 - imported once, for all forks
import numpy as np
import sklearn.datasets  # noqa: F401
import torch
import torch._dynamo
from safetensors import safe_open

import cvtrain.command.train as train_module
from cvtrain.command.job import execute
from cvtrain.compose import Composer, group_choices
from cvtrain.core.files import sha256
from cvtrain.engine import loop
from cvtrain.engine.checkpoint import BEST, LAST, PREVIOUS, CheckpointStore
from cvtrain.report import plots
from cvtrain.resume import without_free

LIFE_LIMIT_S = 180.0
"""A life that takes longer hangs."""
ORPHAN_LIMIT_S = 10.0
"""Data workers must be gone so long after their run was killed (RELIABILITY P1)."""
PHASES = ("save", "evaluate", "conclude")
QUICK = (
    "data=digits", "epochs=3", "batch_size=32", "limit_train_batches=13", "save_every_steps=2", "threads=1",
    "compression=none", "export=none", "logger=none", "plots=false", "report=false",
)  # fmt: skip
TABLES = ("results.csv", "predictions.csv", "per_class.csv")
TIMED = ("seconds",)
"""Fields of a checkpoint that a clock decides."""


class Board:
    """What a life writes where the parent can read it, also after a kill: begun, ended and seconds of each phase."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)

    def _read(self, phase: str) -> tuple[int, int, float]:
        begun, ended, seconds = struct.unpack_from("iid", self._memory, 16 * PHASES.index(phase))
        return begun, ended, seconds

    def _add(self, phase: str, begun: int, ended: int, seconds: float) -> None:
        old = self._read(phase)
        new = (old[0] + begun, old[1] + ended, old[2] + seconds)
        struct.pack_into("iid", self._memory, 16 * PHASES.index(phase), *new)

    def begun(self, phase: str) -> int:
        """Return how often the phase was entered."""
        return self._read(phase)[0]

    def ended(self, phase: str) -> int:
        """Return how often the phase was left."""
        return self._read(phase)[1]

    def mean(self, phase: str) -> float:
        """Return the seconds that the phase takes."""
        return self._read(phase)[2] / max(1, self.ended(phase))

    def watched(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, told of on the board."""

        def watched(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any function
            self._add(phase, 1, 0, 0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._add(phase, 0, 1, time.perf_counter() - start)

        return watched

    def watch(self) -> None:
        """Tell of this process from now on."""
        CheckpointStore._commit = self.watched("save", CheckpointStore._commit)  # type: ignore[method-assign]
        loop.evaluate_model = self.watched("evaluate", loop.evaluate_model)
        train_module.conclude = self.watched("conclude", train_module.conclude)


@dataclass(frozen=True)
class Command:
    """A checked config and its choices: what `execute` takes."""

    config: dict[str, Any]
    choices: dict[str, str]

    @staticmethod
    def parse(overrides: tuple[str, ...]) -> Command:
        """Return the command of QUICK and `overrides`."""
        composed, config = Composer("train", None).check([*QUICK, *overrides], [])
        return Command(config, group_choices(composed.hydra.runtime.choices))


@dataclass
class Orphans:
    """Data workers whose run was killed: adopted by this process, and timed until they are gone."""

    ages: dict[int, float] = field(default_factory=dict)
    slowest: float = 0.0

    def __post_init__(self) -> None:
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER

    def poll(self, living: int = 0) -> int:
        """Return how many are left; `living` is a child that is none."""
        now = time.monotonic()
        for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            if int(pid) != living:
                self.ages.setdefault(int(pid), now)
        for pid in list(self.ages):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self.slowest = max(self.slowest, now - self.ages.pop(pid))
        return len(self.ages)

    def settle(self) -> None:
        """Wait until all are gone; those that outlive the limit twice are killed and counted as that old."""
        start = time.monotonic()
        while self.poll():
            if time.monotonic() - start > 2 * ORPHAN_LIMIT_S:
                self.slowest = 2 * ORPHAN_LIMIT_S
                for pid in self.ages:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def begin(command: Command, folder: Path, prepare: Callable[[], None]) -> int:
    """Fork a life that trains in `folder`, or goes on there; return its process id."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for name in ("batch", "curves", "confusion", "artifacts"):
            setattr(plots, name, lambda *args, **kwargs: np.zeros((8, 8, 3), np.uint8))
        prepare()
        outcome = execute(command.config, folder, [], command.choices)
        code = outcome.exit_code
        if outcome.error is not None:
            sys.stderr.write(f"{outcome.error}\n")
        sys.stdout.flush()
    finally:
        os._exit(code)


def ended(child: int, limit: float = LIFE_LIMIT_S, orphans: Orphans | None = None) -> int | None:
    """Wait for a life; return its exit code, negative for a signal, or None when it hung and was killed."""
    deadline, polled = time.monotonic() + limit, 0.0
    while (now := time.monotonic()) < deadline:
        if orphans is not None and now > polled + 0.05:
            polled = now
            orphans.poll(child)
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def finish(command: Command, folder: Path, orphans: Orphans | None = None) -> int | None:
    """Live to the end; return the exit code, None for a hang."""
    return ended(begin(command, folder, lambda: None), orphans=orphans)


def saved_step(folder: Path) -> int:
    """Return the step of `last`; -1 when there is none, -2 when it is not whole."""
    path = folder / "weights" / LAST
    if not path.is_file():
        return -1
    known = json.loads((path.parent / "manifest.json").read_text())["files"][LAST]
    return int(read(path)[1]["step"]) if sha256(path) in known else -2


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return tensors and document of a checkpoint."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        document = json.loads(file.metadata().get("cvtrain", "{}"))
    return tensors, document


@dataclass
class Difference:
    """What a run has other than the uninterrupted one."""

    bits: int = 0
    what: list[str] = field(default_factory=list)


def compare(expected: Path, found: Path) -> Difference:
    """Compare final, averaged and best weights, optimizer, tables and metrics of two finished runs, to the bit."""
    difference = Difference()
    for name in TABLES:
        if (expected / name).read_bytes() != (found / name).read_bytes():
            difference.what.append(name)
    if summary(expected) != summary(found):
        difference.what.append("metrics.json")
    if scalars(expected) != scalars(found):
        difference.what.append("TensorBoard")
    for name in (LAST, BEST, "model.safetensors"):
        (ours, document), (theirs, other) = read(expected / "weights" / name), read(found / "weights" / name)
        for each in (document, other):
            each["config"] = without_free(each.get("config", {}))  # folder and workers may be others
        for key in sorted({*document, *other} - {*TIMED}):
            if document.get(key) != other.get(key):
                difference.what.append(f"{name}: {key}")
        for key in sorted({*ours, *theirs}):
            bits = differing(ours.get(key), theirs.get(key))
            difference.bits += bits
            if bits:
                difference.what.append(f"{name}: {key}, {bits} bits")
    return difference


def differing(a: torch.Tensor | None, b: torch.Tensor | None) -> int:
    """Return how many bits differ; a missing tensor differs in all of its."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return 8 * sum(t.nbytes for t in (a, b) if t is not None)
    x, y = (int.from_bytes(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), "little") for t in (a, b))
    return (x ^ y).bit_count()


def summary(folder: Path) -> dict[str, Any]:
    """Return metrics.json without latencies."""
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    for row in content["artifacts"]:
        for key in [key for key in row if key.startswith("latency")]:
            del row[key]
    return content


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return TensorBoard's scalars by name as steps and values; empty where nothing is logged."""
    if not list(folder.glob("events*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "_per_s" not in tag]  # speed is the clock's
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def tail(folder: Path, lines: int = 12) -> str:
    """Return the last lines that a run's lives have printed."""
    log = folder.with_suffix(".log")
    return "\n".join(log.read_text().splitlines()[-lines:]) if log.exists() else ""


def copied(source: Path, target: Path) -> Path:
    """Copy a run folder; files that are one on the disk become two."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


__all__ = ["BEST", "LAST", "PREVIOUS"]
