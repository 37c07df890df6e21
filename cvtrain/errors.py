"""Every way a run can end, as exceptions with stable exit codes; torch-free.

The text of an error is one to three lines: what is wrong, where, and what to do. The codes are a promise to
shell scripts and are listed in the README.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

EXIT_OK = 0
EXIT_BUG = 1
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class CvtrainError(Exception):
    """A failure with a known cause: the message names the value, the place and the fix.

    Attributes:
        exit_code: The process's.
        retryable: Whether the same command may succeed later.
        details: One line for each thing that is wrong, where a message cannot hold them all.
    """

    exit_code = EXIT_BUG
    retryable = False
    details: Sequence[str] = ()


class ConfigError(CvtrainError):
    """Unknown key, wrong type or range, contradiction, or a refused `_target_`."""

    exit_code = 2


class RefusedError(ConfigError):
    """What a `_target_` names raised an error of its own when it was built with its settings."""


class DataError(CvtrainError):
    """No data, unreadable pictures, classes that differ between splits, labels out of range."""

    exit_code = 3


class WeightsError(CvtrainError):
    """A checkpoint or weights file that is missing, damaged, refused or of another shape."""

    exit_code = 4


class DivergedError(CvtrainError):
    """The loss or the weights became NaN or infinite.

    Args:
        message: What happened, and what to do.
        step: The first optimizer step of which this is so; None when it is not known.
        batch: Its first micro-batch within the epoch.
    """

    exit_code = 5

    def __init__(self, message: str, step: int | None = None, batch: int = 0) -> None:
        super().__init__(message)
        self.step, self.batch = step, batch


class StorageError(CvtrainError):
    """The disk is full, read-only, or the folder is already in use by an earlier run."""

    exit_code = 6
    retryable = True


class OutOfMemoryError(CvtrainError):
    """The device ran out of memory."""

    exit_code = 7


class WorkerError(CvtrainError):
    """A data worker or another rank died or stopped answering."""

    exit_code = 8
    retryable = True


class LockedError(CvtrainError):
    """Another live process is writing to the same run folder."""

    exit_code = 9
    retryable = True


class GateError(CvtrainError):
    """A `gate.*` threshold was missed."""

    exit_code = 10


class Interrupted(CvtrainError):  # noqa: N818 - a request to stop, not an error
    """SIGINT or SIGTERM asked the run to stop; the checkpoint has been written."""

    retryable = True

    def __init__(self, message: str, exit_code: int = EXIT_SIGINT) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(word: str, choices: Iterable[str], limit: int = 3) -> list[str]:
    """Return up to `limit` of `choices` closest to `word`, best first; empty when none is close."""
    return difflib.get_close_matches(word, list(choices), n=limit, cutoff=0.5)


def did_you_mean(word: str, choices: Iterable[str], what: str = "choices") -> str:
    """Return `did you mean 'x'? choices: a, b, c`, the part of an error that names the fix."""
    names = list(choices)
    close = nearest(word, names)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    shown = names if len(names) <= 40 else [*close, "…"]
    return f"{hint}{what}: {', '.join(shown)}"
