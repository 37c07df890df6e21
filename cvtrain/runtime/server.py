"""An artifact in a process of its own, as the world will run it: nothing but its file comes with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cvtrain import errors
from cvtrain.errors import CvtrainError, WeightsError, WorkerError
from cvtrain.runtime.base import Running

if TYPE_CHECKING:
    from cvtrain.core.artifact import Artifact

# The import path first: what lies in the current folder must not pass for a library.
_CODE = (
    "import sys; sys.path[:] = sys.argv[3:]; from cvtrain.command.worker import main; main(sys.argv[1], sys.argv[2])"
)
_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What would make the child one of several, as its parent is under torchrun."""
_LOOK_S = 0.25
"""Seconds between two looks whether the other process still lives."""
_LAST_WORDS = 2000


class Worker:
    """A `Running` in a process of its own, which ends with `close`, or with this process however that ends.

    It starts at once and loads while this process goes on; the first call waits for it. It is in a session of its own,
    so that Ctrl-C reaches this process only, and what it prints nobody sees.

    Args:
        artifact: What to run.
        threads: Threads inside one operator.
        trusted: The user's own packages, which a network may come from.
    """

    def __init__(self, artifact: Artifact, threads: int, trusted: Sequence[str] = ()) -> None:
        self._artifact = artifact
        self._ready: tuple[dict[str, str], bool] | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self._pipe, theirs = multiprocessing.Pipe()
        alone = {key: value for key, value in os.environ.items() if key not in _LAUNCH}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CODE, str(theirs.fileno()), str(os.getpid()), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={"OMP_WAIT_POLICY": "PASSIVE", **alone, "OMP_NUM_THREADS": str(threads)},
            )
        with contextlib.suppress(OSError):  # it has died already; the first call says so
            self._pipe.send((artifact.runtime, artifact.path.absolute(), threads, list(trusted)))

    @property
    def pid(self) -> int:
        """Return the child's process number."""
        return self._process.pid

    @property
    def metadata(self) -> dict[str, str]:
        """Return the text that the file carries; waits until it is loaded."""
        return self._loaded()[0]

    @property
    def embedded(self) -> bool:
        """Return whether it answers with probabilities; waits until it is loaded."""
        return self._loaded()[1]

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pictures `(B, C, resize, resize)` to logits, or where `embedded` probabilities, `(B, K)`."""
        answer: NDArray[np.float32] = self._ask("run", images)
        return answer

    def time(self, batch: int, runs: int) -> list[float]:
        """Return the milliseconds of `runs` calls of the model on `batch` pictures that are prepared already."""
        times: list[float] = self._ask("time", batch, runs)
        return times

    def memory(self) -> float:
        """Return the child's peak of resident memory so far, in MB above what it took before it loaded the file."""
        peak: float = self._ask("memory")
        return peak

    def close(self) -> None:
        """End the child at once: it has nothing to save."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()
        self._output.close()

    def _loaded(self) -> tuple[dict[str, str], bool]:
        if self._ready is None:
            self._ready = self._answer()
        return self._ready

    def _ask(self, method: str, *arguments: object) -> Any:  # noqa: ANN401 - whatever the method returns
        self._loaded()
        try:
            self._pipe.send((method, arguments))
        except OSError as error:
            raise self._died() from error
        return self._answer()

    def _answer(self) -> Any:  # noqa: ANN401 - whatever was asked for
        try:
            # Not the end of the pipe alone: a data worker that was forked from this process may hold it open.
            while not self._pipe.poll(_LOOK_S):
                if self._process.poll() is not None and not self._pipe.poll():
                    raise self._died()
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if kind:
            raise getattr(errors, kind)(f"artifact {self._artifact.name!r}: {value}")
        return value

    def _died(self) -> WorkerError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        code = self._process.poll()
        how = f"exit code {code}" if code is None or code >= 0 else f"killed by {signal.Signals(-code).name}"
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - _LAST_WORDS))
        words = self._output.read().decode(errors="replace").strip().splitlines()
        said = f"; it said: {words[-1][:200]}" if words else ""
        hint = "The machine may be short of memory." if code == -signal.SIGKILL else "Its runtime may be broken."
        return WorkerError(
            f"artifact {self._artifact.name!r}: the process that ran {self._artifact.path} in "
            f"{self._artifact.runtime} has died ({how}{said}).\n{hint} Try again, or leave this artifact out."
        )


def serve(connection: Connection, start: Callable[..., Running]) -> None:
    """Answer the `Worker` at the other end until it closes; the first message is what to start.

    Args:
        connection: To the parent.
        start: Called with the first message: runtime, path, threads, trusted packages.
    """
    with contextlib.suppress(EOFError, OSError):
        what = connection.recv()
        runtime, path = what[:2]
        try:
            running = start(*what)
            connection.send(("", (running.metadata, running.embedded)))
        except Exception as error:
            connection.send(_told(error, WeightsError, f"{path} cannot be loaded in {runtime}"))
            return
        while True:
            method, arguments = connection.recv()
            try:
                connection.send(("", getattr(running, method)(*arguments)))
            except Exception as error:
                connection.send(_told(error, CvtrainError, f"{path} fails in {runtime}"))


def _told(error: Exception, otherwise: type[CvtrainError], what: str) -> tuple[str, str]:
    """Return the class of an error and its text, which the parent raises again."""
    if isinstance(error, CvtrainError):
        kind = next(base for base in type(error).__mro__ if base.__module__ == errors.__name__)
        return kind.__name__, str(error)
    if isinstance(error, MemoryError):
        return errors.OutOfMemoryError.__name__, f"{what}: the machine has no memory left"
    reason = (str(error).strip().splitlines() or [""])[0][:300]
    return otherwise.__name__, f"{what} ({type(error).__name__}: {reason}). Export it again, or leave it out."


def end_with(parent: int) -> None:
    """End this process as soon as `parent` has ended, also when that was killed while this one computes."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
