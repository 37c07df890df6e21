"""Stopping on request: finish the step, save, and say how to go on."""

from __future__ import annotations

import os
import signal
from types import FrameType

from cvtrain.errors import EXIT_SIGINT, EXIT_SIGTERM, Interrupted

_CODES = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM, signal.SIGHUP: EXIT_SIGTERM}


class StopRequest:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a flag that the loop reads; a second one leaves at once."""

    def __init__(self) -> None:
        self._signal: int | None = None
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
            name = signal.Signals(self._signal).name
            raise Interrupted(f"stopped by {name}; the checkpoint is written.", _CODES[signal.Signals(self._signal)])

    def _handle(self, number: int, frame: FrameType | None) -> None:
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
