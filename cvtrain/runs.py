"""Run folders: making, locking, finding and describing them; torch-free."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from cvtrain.core.files import storage_error, write_json
from cvtrain.errors import CvtrainError, Interrupted, LockedError, StorageError

STATUS, ARGS = "status.json", "args.yaml"
FREE_KEYS = ("resume", "json", "output_dir", "trusted", "workers", "name")
"""Keys that may differ between a run and its continuation: they change nothing that is computed."""


def config_hash(config: dict[str, Any]) -> str:
    """Return a short SHA-256 of a resolved config without its free keys."""
    core = {key: value for key, value in config.items() if key not in FREE_KEYS}
    return hashlib.sha256(json.dumps(core, sort_keys=True).encode()).hexdigest()[:16]


def create_folder(parent: Path) -> Path:
    """Make `parent/<date>_<time>[-k]`, a name no other run has, and return its absolute path.

    Raises:
        StorageError: `parent` cannot be written.
    """
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for k in range(1, 1000):
        folder = (parent / (stamp if k == 1 else f"{stamp}-{k}")).absolute()
        try:
            folder.mkdir(parents=True, exist_ok=False)
        except FileExistsError:
            if not folder.parent.is_dir():
                raise StorageError(f"{folder.parent} is not a folder. Choose another output_dir=DIR.") from None
            continue
        except OSError as error:
            raise storage_error(folder, error) from error
        return folder
    raise StorageError(f"no free run folder below {parent}. Choose another output_dir=DIR.")


def find_run(parent: Path, digest: str) -> Path | None:
    """Return the newest run folder below `parent` whose config has this hash, finished or not."""
    for folder in sorted((p for p in parent.glob("*") if p.is_dir()), reverse=True):
        if read_json(folder / "manifest.json").get("config_hash") == digest:
            return folder.absolute()
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, or an empty one when the file is missing or torn."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def is_finished(folder: Path) -> bool:
    """Return whether the run in `folder` ended with exit code 0."""
    status = read_json(folder / STATUS)
    return status.get("state") == "done" and status.get("exit_code") == 0


def write_status(folder: Path, state: str, exit_code: int | None, reason: str = "", retryable: bool = False) -> None:
    """Say in status.json how the run stands: `running`, `done`, `failed`, `stopped`.

    Args:
        folder: The run folder.
        state: One of the four words.
        exit_code: None while running.
        reason: The error's text.
        retryable: Whether the same command may succeed later.
    """
    files = read_json(folder / "weights" / "manifest.json").get("files", {})
    has_last = "last.safetensors" in files and (folder / "weights" / "last.safetensors").exists()
    write_json(
        folder / STATUS,
        {
            "state": state,
            "exit_code": exit_code,
            "reason": reason,
            "retryable": retryable,
            "checkpoint": "weights/last.safetensors" if has_last else None,
            "sha256": files["last.safetensors"][0] if has_last else None,
        },
    )


_held: set[IO[str]] = set()


def _let_go() -> None:
    for file in _held:
        file.close()


# A data worker that outlives its killed parent by some seconds must not keep the run locked.
os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def _kept_from_children(file: IO[str]) -> Iterator[None]:
    _held.add(file)
    try:
        yield
    finally:
        _held.discard(file)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `run.lock`, so that two processes never write to one run; free at once when the holder dies.

    Raises:
        LockedError: Another live process holds it.
    """
    path = folder / "run.lock"
    try:
        file = path.open("a+")
    except OSError as error:
        raise storage_error(path, error) from error
    with file, _kept_from_children(file):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LockedError(
                f"{folder} is in use by process {file.read().strip()}. Wait for it, or start another run."
            ) from None
        except OSError as error:  # a network mount without locks
            raise storage_error(path, error) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def ending(error: BaseException) -> tuple[str, bool]:
    """Return the state word and whether to retry for an error that ended a run."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped", True
    if not isinstance(error, CvtrainError):
        return "failed", False
    return ("stopped" if isinstance(error, Interrupted) else "failed"), error.retryable
