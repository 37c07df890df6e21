"""From a library's attempt at a file to the file itself, or to a message of three lines."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cvtrain.core.files import storage_error, sync_folder
from cvtrain.core.quiet import quiet
from cvtrain.errors import CvtrainError


class ExportError(CvtrainError):
    """Why a library cannot write a network, or how its file differs; without the option's name."""


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a place to write to; what lies there at the end becomes `path` and the files beside it.

    When the block raises, the old file stands.

    Raises:
        StorageError: The disk is full or read-only.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.tmp-") as temporary:
            # The final name, because a file with outside data stores the name of its data.
            work = Path(temporary) / path.name
            yield work
            for file in (*sorted(set(work.parent.iterdir()) - {work}), work):
                with file.open("rb") as written:
                    os.fsync(written.fileno())
                file.replace(path.with_name(file.name))
            sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error


@contextmanager
def asking(failure: str) -> Iterator[None]:
    """Keep a library's chatter off the terminal, and turn what it raises into an `ExportError` "`failure` (reason)"."""
    try:
        with quiet():
            yield
    except (OSError, MemoryError, CvtrainError):
        raise
    except Exception as error:
        raise ExportError(f"{failure} ({first_line(error)})") from error


@contextmanager
def reporting(option: str) -> Iterator[None]:
    """Turn an `ExportError` into the message that a user sees, with the option's name and the fix."""
    try:
        yield
    except ExportError as error:
        raise CvtrainError(
            f"export={option}: {error}.\nLeave out {option} and what needs it, or choose another model."
        ) from error


def first_line(error: Exception) -> str:
    """Return the beginning of what a library has raised."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
