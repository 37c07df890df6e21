"""Stopping on request: finish the step, save, and say how to go on."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from cvtrain.errors import EXIT_SIGINT, EXIT_SIGTERM, Interrupted

_CODES = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM, signal.SIGHUP: EXIT_SIGTERM}


class StopRequest:
    """What SIGINT, SIGTERM and SIGHUP do: inside `deferred` they set a flag that the loop reads, elsewhere they raise.

    A second one inside `deferred` leaves the process at once.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._deferring = False
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Return whether a signal has arrived."""
        return self._signal is not None

    def check(self) -> None:
        """Leave when a signal has arrived; call this right after a save.

        Raises:
            Interrupted: With exit code 130 or 143.
        """
        if self._signal is not None:
            raise _interrupted(self._signal, "the checkpoint is written")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold signals back while the training state is between two checkpoints."""
        before, self._deferring = self._deferring, True
        try:
            yield
        finally:
            self._deferring = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferring:
            raise _interrupted(number, "no training step was lost")
        if self._signal is not None:
            os._exit(_CODES[signal.Signals(number)])
        self._signal = number

    def __enter__(self) -> StopRequest:
        """Take over the signals (only the main thread may)."""
        for number in _CODES:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def _interrupted(number: int, state: str) -> Interrupted:
    name = signal.Signals(number).name
    return Interrupted(f"stopped by {name}; {state}.", _CODES[signal.Signals(number)])
