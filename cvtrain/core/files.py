"""Durable files: a reader sees the old content or the new, never a mixture, also after kill -9 or a power cut."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvtrain.errors import StorageError


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Temporary:
    """A file on the disk that has not got its name yet; `digest` is the hex SHA-256 of its `size` bytes."""

    path: Path
    digest: str
    size: int


def write_temporary(path: Path, pieces: Iterable[bytes | memoryview]) -> Temporary:
    """Write `pieces`, one behind the other, into a file beside `path`, flushed to the disk.

    Raises:
        StorageError: The disk is full or read-only; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    sha, size, rest = hashlib.sha256(), 0, iter(pieces)
    try:
        with temporary.open("wb", buffering=0) as file:
            for piece in rest:
                left = memoryview(piece)
                sha.update(left)
                size += left.nbytes
                while left.nbytes:  # a nearly full disk takes a part of it
                    left = left[file.write(left) :]
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise storage_error(path, error, size + sum(memoryview(piece).nbytes for piece in rest)) from error
    return Temporary(temporary, sha.hexdigest(), size)


def write_atomic(path: Path, content: str | bytes | Iterable[bytes | memoryview]) -> None:
    """Replace `path` by `content`: temporary file, fsync, rename, fsync of the folder.

    Raises:
        StorageError: The disk is full or read-only; the old file stands.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = write_temporary(path, [data] if isinstance(data, bytes) else data)
    try:
        temporary.path.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.path.unlink()
        raise storage_error(path, error, temporary.size) from error


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process left in `folder` and below."""
    for path in list(folder.rglob(".*.tmp-*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
            continue
        with contextlib.suppress(OSError):
            path.unlink()


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Replace `path` by `value` as indented JSON; NaN becomes null so that every parser reads it."""
    write_atomic(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def to_json_line(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Return `value` as one line of standard JSON; NaN and infinity become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_full(error: StorageError) -> bool:
    """Return whether a `storage_error` says that the disk has no space, which removing files would give."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)


def storage_error(path: Path, error: OSError, needed: int = 0) -> StorageError:
    """Turn an OSError on `path` into a message with the free space and the fix."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        try:
            free = shutil.disk_usage(path.parent).free
        except OSError:
            free = 0
        return StorageError(
            f"disk full: {path} needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free.\n"
            "Free some space or choose another output_dir=DIR; then go on with resume=auto."
        )
    return StorageError(
        f"cannot write {path}: {error.strerror or error}. Check the folder's rights, or set output_dir=DIR."
    )
