"""Stopping on request: finish the step, save, and say how to go on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from cvtrain.errors import EXIT_SIGINT, EXIT_SIGTERM, Interrupted

_CODES = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM, signal.SIGHUP: EXIT_SIGTERM}

GRACE_S = 20.0
"""Seconds from the first signal to the end; torchrun and Kubernetes kill after 30."""
LAST_WORDS_S = 0.5
"""Seconds in which a process that leaves at once may still say so in its status file."""


class StopRequest:
    """What signals do.

    SIGINT, SIGTERM and SIGHUP set a flag inside `deferred`, which the loop reads, and raise elsewhere. A second one
    leaves the process at once, and so does the end of the grace time, as when a step waits for data that never comes.
    SIGUSR1 asks for a checkpoint and no more. A SIGHUP that is ignored when training starts, by nohup, stays ignored.

    Args:
        leaving: Called with the reason and the exit code before the process is left at once.
        grace_s: Seconds from the first signal to the end.
    """

    def __init__(
        self, leaving: Callable[[str, int], object] = lambda reason, code: None, grace_s: float = GRACE_S
    ) -> None:
        self.save_now = False
        """Whether a checkpoint is asked for; who saves sets it back."""
        self._leaving = leaving
        self._grace_s = grace_s
        self._signal: int | None = None
        self._deferring = False
        self._deadline: threading.Timer | None = None
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Return whether a signal has arrived."""
        return self._signal is not None

    @property
    def deferring(self) -> bool:
        """Return whether signals are held back, that is, whether a run is training."""
        return self._deferring

    def exchange(self, more: bool = False) -> bool:
        """Hear of other processes' requests, where there are any; return whether `more` is true anywhere."""
        return more

    def check(self) -> None:
        """Leave when a signal has arrived; call this right after a save.

        Raises:
            Interrupted: With exit code 130 or 143.
        """
        self.check_here()

    def check_here(self) -> None:
        """Leave when a signal has reached this process, whatever others have heard.

        Raises:
            Interrupted: With exit code 130 or 143.
        """
        if self._signal is not None:
            raise interrupted(self._signal, "the checkpoint is written")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold signals back while the training state is between two checkpoints."""
        before, self._deferring = self._deferring, True
        try:
            yield
        finally:
            self._deferring = before
        if not before:  # one may have come since the last save
            self.exchange()
            self.check()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            self._leave(number, "a second signal; the last checkpoint stands")
        self._signal = number
        self._deadline = threading.Timer(
            self._grace_s,
            self._leave,
            (number, f"it did not end within {self._grace_s:g} s; the last checkpoint stands"),
        )
        self._deadline.daemon = True
        self._deadline.start()
        if not self._deferring:
            raise interrupted(number, "no training step was lost")

    def _leave(self, number: int, reason: str) -> None:
        """End the process without waiting for anything that may hang: not for a step, a worker or the disk."""
        code = _CODES[signal.Signals(number)]
        text = f"stopped by {signal.Signals(number).name}; {reason}."
        words = threading.Thread(target=self._leaving, args=(text, code), daemon=True)
        words.start()
        words.join(LAST_WORDS_S)
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(code)

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.save_now = True

    def __enter__(self) -> StopRequest:
        """Take over the signals (only the main thread may)."""
        handlers = {**dict.fromkeys(_CODES, self._handle), signal.SIGUSR1: self._save}
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            del handlers[signal.SIGHUP]
        for number, handler in handlers.items():
            self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the signals back."""
        if self._deadline is not None:
            self._deadline.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def interrupted(number: int, state: str) -> Interrupted:
    """Return what a run raises that signal `number` has ended."""
    name = signal.Signals(number).name
    return Interrupted(f"stopped by {name}; {state}.", _CODES[signal.Signals(number)])
