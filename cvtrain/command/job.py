"""One training job, from a checked config to an outcome that scripts can read."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from cvtrain import runs
from cvtrain.core.files import storage_error, sweep, to_json_line
from cvtrain.errors import EXIT_SIGINT, EXIT_SIGTERM, CvtrainError, Interrupted, OutOfMemoryError, WorkerError

STORAGE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})


@dataclass
class Outcome:
    """How a job ended; the JSON of the last line, and a row of a sweep's table."""

    run: str
    status: str
    exit_code: int
    metrics: dict[str, float] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, int] = field(default_factory=dict)
    seconds: float | None = None
    overrides: list[str] = field(default_factory=list)
    error: CvtrainError | None = None

    def json_line(self) -> str:
        """Return the object that `json=true` prints."""
        plain = dataclasses.asdict(dataclasses.replace(self, error=None))
        plain.pop("error")
        plain.pop("seconds")
        plain.pop("overrides")
        return to_json_line(plain)


def execute(
    config: dict[str, Any],
    folder: Path,
    trusted: list[str],
    choices: dict[str, str],
    explained: Callable[[BaseException], BaseException] = lambda error: error,
) -> Outcome:
    """Train by `config` in `folder`; every failure becomes an outcome and a status.json.

    Args:
        config: Resolved, audited and validated.
        folder: The run folder; exists.
        trusted: The user's own packages.
        choices: Which option each group has.
        explained: Maps an exception to the one that it is a consequence of.
    """
    started = time.monotonic()
    outcome = Outcome(run=str(folder), status="failed", exit_code=1)
    try:
        with runs.locked(folder), held_signals() as signals:
            outcome = _execute_locked(config, folder, trusted, choices, explained, signals)
    except CvtrainError as error:  # the lock, or a disk on which not even the status can be written
        outcome.status, outcome.exit_code, outcome.error = runs.ending(error)[0], error.exit_code, error
    outcome.seconds = time.monotonic() - started
    return outcome


class HeldSignals:
    """What SIGINT and SIGTERM do outside of the training: end the run, but not what it writes at its end."""

    over = False
    """Whether only that is left."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal.

        Raises:
            Interrupted: Unless the run is over.
        """
        if self.over:
            return
        code = EXIT_SIGINT if number == signal.SIGINT else EXIT_SIGTERM
        raise Interrupted(f"stopped by {signal.Signals(number).name}; no training step was lost.", code)


@contextlib.contextmanager
def held_signals() -> Iterator[HeldSignals]:
    """Take over SIGINT and SIGTERM, until the training has handlers of its own and behind it."""
    handler = HeldSignals()
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _execute_locked(
    config: dict[str, Any],
    folder: Path,
    trusted: list[str],
    choices: dict[str, str],
    explained: Callable[[BaseException], BaseException],
    signals: HeldSignals,
) -> Outcome:
    outcome = Outcome(run=str(folder), status="done", exit_code=0)
    sweep(folder)
    runs.write_status(folder, "running", None)
    try:
        from cvtrain.command.train import train

        result = train(config, folder, trusted, choices)
        signals.over = True
        outcome.metrics, outcome.artifacts, outcome.data = result.metrics, result.artifacts, result.data
        runs.write_status(folder, "done", 0)
    except BaseException as caught:  # also KeyboardInterrupt outside the loop
        signals.over = True
        error = _known(explained(caught), folder)
        state, retryable = runs.ending(error)
        runs.write_status(folder, state, error.exit_code, str(error), retryable)
        outcome.status, outcome.exit_code, outcome.error = state, error.exit_code, error
        summary = runs.read_json(folder / "metrics.json")  # there when only an artifact failed
        outcome.metrics, outcome.data = summary.get("metrics", {}), summary.get("data", {})
        outcome.artifacts = summary.get("artifacts", [])
        traceback.clear_frames(caught.__traceback__)  # a sweep must not keep the model of a failed job
    return outcome


def _known(error: BaseException, folder: Path) -> CvtrainError:
    if isinstance(error, CvtrainError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("stopped by SIGINT.", EXIT_SIGINT)
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "allocate memory" in str(error):
        return OutOfMemoryError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'no memory left'}\n"
            "Lower batch_size (and raise grad_accum_steps to keep the effective batch), use precision=amp, "
            "or lower img_size."
        )
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        # Torch hears of it by SIGCHLD, and raises wherever the main thread is just then.
        return WorkerError(
            f"a data worker died: {str(error).splitlines()[0]}\n"
            "Often memory (also /dev/shm): lower workers or batch_size, or use workers=0."
        )
    if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
        return storage_error(Path(str(error.filename)) if error.filename else folder / runs.STATUS, error)
    text = "".join(traceback.format_exception(error))
    try:
        (folder / "crash.txt").write_text(text)
        where = f"The traceback is in {folder / 'crash.txt'}; please report it."
    except OSError:
        sys.stderr.write(text)
        where = "Please report it."
    return CvtrainError(f"internal error: {type(error).__name__}: {error}\n{where}")
