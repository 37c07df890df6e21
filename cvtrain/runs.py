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

from cvtrain import resume
from cvtrain.core.files import sha256, storage_error, write_json
from cvtrain.errors import CvtrainError, Interrupted, LockedError, StorageError, WeightsError

STATUS, ARGS, MANIFEST = "status.json", "args.yaml", "manifest.json"
CHECKPOINTS = ("last.safetensors", "last.previous.safetensors", "best.safetensors")


def config_hash(config: dict[str, Any]) -> str:
    """Return a short SHA-256 of a resolved config without its free keys."""
    return hashlib.sha256(json.dumps(resume.without_free(config), sort_keys=True).encode()).hexdigest()[:16]


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


def newest_first(parent: Path, file: str = MANIFEST) -> list[tuple[Path, dict[str, Any]]]:
    """Return the folders below `parent` that hold a JSON `file`, with its content, the newest first.

    New is what has the higher `number` in that file; folders' names, which a wrong clock can put out of order, decide
    among equals.
    """
    found = [(folder.absolute(), read_json(folder / file)) for folder in parent.glob("*")]
    kept = [(folder, content) for folder, content in found if content]
    return sorted(kept, key=lambda pair: (int(pair[1].get("number", 0)), pair[0].name), reverse=True)


def next_number(parent: Path, file: str = MANIFEST) -> int:
    """Return a number above that of every run (or sweep, told by `file`) below `parent`."""
    return 1 + max((int(content.get("number", 0)) for _, content in newest_first(parent, file)), default=0)


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


def shipped_weights(given: Path, key: str) -> tuple[Path, str]:
    """Return the weights that a finished run left, and their SHA-256.

    Args:
        given: The run's folder, or a weights file.
        key: The option that names it, for messages.

    Raises:
        WeightsError: It is missing, unfinished, a checkpoint, or damaged.
    """
    path = given / "weights" / "model.safetensors" if given.is_dir() else given
    if path.name in CHECKPOINTS:
        raise WeightsError(f"{key}={given} is a checkpoint; give the run's folder, or its weights/model.safetensors.")
    if path.is_file():
        digest = sha256(path)
        files = read_json(path.parent / MANIFEST).get("files")
        if isinstance(files, dict) and digest not in files.get(path.name, [digest]):
            raise WeightsError(
                f"{key}: {path} is damaged: its SHA-256 is not the one in manifest.json beside it.\n"
                "Train it again, or bring its file back from a backup."
            )
        return path, digest
    if (given / MANIFEST).is_file():
        raise WeightsError(
            f"{key}={given} has no weights/model.safetensors. Let that run finish: the same command with resume=auto."
        )
    raise WeightsError(
        f"{key}={given} {'holds no run' if given.is_dir() else 'does not exist'}; give the folder that a run printed, "
        "or a model.safetensors."
    )


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
    resumes = read_json(folder / MANIFEST).get("resumes", [])
    last = folder / "weights" / "last.safetensors"
    has_last = "last.safetensors" in files and last.exists()
    reached = _document(last) if has_last else {}
    write_json(
        folder / STATUS,
        {
            "state": state,
            "exit_code": exit_code,
            "reason": reason,
            "retryable": retryable,
            "epoch": reached.get("epoch"),
            "step": reached.get("step"),
            "checkpoint": "weights/last.safetensors" if has_last else None,
            "sha256": files["last.safetensors"][0] if has_last else None,
            "resume_level": resume.worst([entry["level"] for entry in resumes]),
        },
    )


def _document(checkpoint: Path) -> dict[str, Any]:
    """Return the document in the header of a checkpoint, without reading its tensors."""
    try:
        with checkpoint.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        document = json.loads(header["__metadata__"]["cvtrain"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
        return {}  # damaged: who restores it will say so
    return document if isinstance(document, dict) else {}


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
