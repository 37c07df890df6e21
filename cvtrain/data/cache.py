"""Decoded pictures kept between runs: one memory-mapped file of uint8 squares, and what was found unreadable."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

from cvtrain.core.files import storage_error, sync_folder, write_atomic
from cvtrain.errors import StorageError

log = logging.getLogger("cvtrain")

Fill = Callable[[NDArray[np.uint8]], "Verdicts"]

LAYOUT = "1"
"""Raise it when the pixels or the file change for equal pictures: older files are then left alone."""


@dataclass
class Verdicts:
    """What reading the pictures showed.

    Attributes:
        bad: Position -> "place: reason" of those that cannot be read.
        several: Places of those with several frames, of which the first is taken.
        passing: Whether one of the failures may pass, such as a drive that does not answer; then nothing is kept.
    """

    bad: dict[int, str] = field(default_factory=dict)
    several: list[str] = field(default_factory=list)
    passing: bool = False

    def to_json(self) -> str:
        """Return JSON text."""
        return json.dumps({"bad": {str(k): v for k, v in self.bad.items()}, "several": self.several})

    @staticmethod
    def from_json(text: str) -> Verdicts:
        """Read `to_json`'s text; raise KeyError, TypeError, AttributeError or ValueError for another one."""
        content = json.loads(text)
        return Verdicts({int(k): str(v) for k, v in content["bad"].items()}, [str(v) for v in content["several"]])


class Cache:
    """A folder of such files, which may be deleted at any time when no run uses it.

    Args:
        folder: Where they lie; None means `$XDG_CACHE_HOME/cvtrain` or `~/.cache/cvtrain`.
    """

    def __init__(self, folder: str | None) -> None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = Path(folder) if folder is not None else base / "cvtrain"

    def key(self, identities: list[str], settings: tuple[object, ...]) -> str:
        """Return a name that changes with any picture and any setting.

        Args:
            identities: One text a picture, in the order of the rows.
            settings: What decides the pixels.
        """
        digest = hashlib.sha256(repr((LAYOUT, PIL.__version__, settings)).encode())
        for identity in identities:
            digest.update(identity.encode("utf-8", "surrogateescape") + b"\0\0")
        return digest.hexdigest()[:32]

    def pixels(self, key: str, shape: tuple[int, int, int, int], fill: Fill) -> tuple[NDArray[np.uint8], Verdicts, str]:
        """Return the file of this key, made first when it is not there.

        A file gets its final name when it is complete and on the disk. Of two runs that need the same file one makes
        it and the other waits; a lock dies with its process.

        Args:
            key: From `key`.
            shape: `(N, S, S, C)`.
            fill: Writes the pictures into an array of this shape.

        Returns:
            The memory-mapped uint8 array, writing to which changes no file; the verdicts; and a sentence for the log.

        Raises:
            StorageError: The folder cannot be written, or the disk is full; nothing is left behind.
        """
        path, size = self.folder / f"{key}.npy", int(np.prod(shape))
        # Before any writing: a complete file is enough, also in a folder that is somebody else's.
        found = self._opened(key, shape)
        try:
            if found is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                with self._locked(key):
                    found = self._opened(key, shape)
                    if found is None:
                        return self._make(key, shape, fill)
        except OSError as error:
            raise self._storage_error(path, error, size) from error
        return *found, f"{shape[0]} pictures are read from the cache {path}"

    def verdicts(self, key: str, look: Callable[[], Verdicts]) -> tuple[Verdicts, bool]:
        """Return what `look` found the last time, or finds now; and whether it was known.

        A folder that cannot be written only means looking again the next time.
        """
        path = self.folder / f"{key}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            return Verdicts.from_json(path.read_text()), True
        found = look()
        if found.passing:
            return found, False
        with contextlib.suppress(OSError, StorageError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, found.to_json())
        return found, False

    def _opened(self, key: str, shape: tuple[int, int, int, int]) -> tuple[NDArray[np.uint8], Verdicts] | None:
        try:
            array = np.load(self.folder / f"{key}.npy", mmap_mode="c")
            verdicts = Verdicts.from_json((self.folder / f"{key}.json").read_text())
        # Absent, or cut off by something else than a run: made anew.
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return (array, verdicts) if array.shape == shape and array.dtype == np.uint8 else None

    def _make(self, key: str, shape: tuple[int, int, int, int], fill: Fill) -> tuple[NDArray[np.uint8], Verdicts, str]:
        for left in self.folder.glob(f".{key}.tmp-*"):
            left.unlink(missing_ok=True)
        temporary, path = self.folder / f".{key}.tmp-{os.getpid()}", self.folder / f"{key}.npy"
        try:
            with temporary.open("wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_2_0(file, header)
                offset = file.tell()
                # A full disk must show here: a write through the map would kill the process.
                os.posix_fallocate(file.fileno(), 0, offset + int(np.prod(shape)))
            array = np.memmap(temporary, np.uint8, "r+", offset, shape)
            verdicts = fill(array)
            array.flush()
            del array
            pixels: NDArray[np.uint8] = np.load(temporary, mmap_mode="c")
            if verdicts.passing:
                # Still mapped, and gone with the run.
                temporary.unlink()
                return pixels, verdicts, "the cache is not kept: some pictures may only now be unreadable"
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            write_atomic(self.folder / f"{key}.json", verdicts.to_json())
            temporary.replace(path)
            sync_folder(self.folder)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        megabytes = int(np.prod(shape)) / 2**20
        return pixels, verdicts, f"{shape[0]} pictures decoded once into the cache {path} ({megabytes:.0f} MiB)"

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        with (self.folder / f".{key}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("data: another run is making the cache %s; waiting for it", self.folder / f"{key}.npy")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _storage_error(self, path: Path, error: OSError, size: int) -> StorageError:
        fix = "Give another folder with data.cache_dir=DIR, or use data.cache=none."
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return StorageError(f"{str(storage_error(path, error, size)).splitlines()[0]}\nFree some space. {fix}")
        return StorageError(f"cannot write the cache {path}: {error.strerror or error}\n{fix}")
