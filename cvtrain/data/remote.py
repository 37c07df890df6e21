"""Files from a web server: asked for patiently, and kept in a local folder of limited size."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from cvtrain.core.files import storage_error
from cvtrain.errors import DataError, StorageError

Result = TypeVar("Result")

TRIES = 3
PAUSE = 0.5
"""Seconds before the second try; twice as long before the third."""
TIMEOUT = 30.0
"""Seconds without an answer or a byte."""

_CHUNK = 1 << 20
_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that may be gone at the next try."""


def shown(url: str) -> str:
    """Return a URL for messages, without what may hold a key."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def beside(url: str, name: str) -> str:
    """Return the URL of another file in the same folder."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def ask(url: str, use: Callable[[http.client.HTTPResponse], Result], method: str = "GET") -> Result:
    """Return what `use` makes of the answer, tried three times where trying again may help.

    Raises:
        DataError: No such server, no answer in time, or an HTTP status of failure, in the error's `__cause__`.
    """
    cause: Exception
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=TIMEOUT) as answer:
                return use(answer)
        except urllib.error.HTTPError as error:
            reason, cause = f"HTTP status {error.code} {error.reason}", error
            if error.code not in _PASSING:
                break
        except (http.client.HTTPException, OSError) as error:
            reason, cause = str(getattr(error, "reason", error)) or type(error).__name__, error
    tries = f" after {attempt + 1} tries" if attempt else ""
    raise DataError(
        f"data=shards: {shown(url)}: {reason}{tries}\n  check the URL and the server; data.root takes local files too"
    ) from cause


def text(url: str) -> str | None:
    """Return a text file; None when the server has none; errors as `ask`."""
    try:
        return ask(url, lambda answer: answer.read().decode("utf-8", "replace"))
    except DataError as error:
        if _status(error) in (403, 404, 410):
            return None
        raise


def _status(error: DataError) -> int | None:
    cause = error.__cause__
    return cause.code if isinstance(cause, urllib.error.HTTPError) else None


class Store:
    """A folder of downloaded files, those used longest ago removed first; shared by threads, workers and runs.

    Args:
        folder: Where they lie.
        limit: Bytes they may take together.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def open(self, name: str, size: int, fetch: Callable[[int], None]) -> int:
        """Return an open file descriptor, which stays good if the file is removed meanwhile.

        Args:
            name: The file's.
            size: Bytes it has.
            fetch: Writes it to a file descriptor.

        Raises:
            DataError: From `fetch`.
            StorageError: It cannot be written.
        """
        path = self.folder / name
        try:
            found = self._opened(path)
            if found is not None:
                return found
            self.folder.mkdir(parents=True, exist_ok=True)
            # One process downloads it, the others wait.
            with self._locked(name):
                found = self._opened(path)
                return self._fetched(path, size, fetch) if found is None else found
        except OSError as error:
            raise self._storage_error(error, size) from error

    def write(self, descriptor: int, content: bytes, offset: int) -> int:
        """Write at `offset` and return how many bytes; raise StorageError when that fails."""
        try:
            return os.pwrite(descriptor, content, offset)
        except OSError as error:
            raise self._storage_error(error, len(content)) from error

    def _storage_error(self, error: OSError, size: int) -> StorageError:
        reason = str(storage_error(self.folder, error, size)).splitlines()[0]
        return StorageError(
            f"{reason}\nFree some space, lower data.shards_mb, or give another folder with data.cache_dir=DIR."
        )

    def _opened(self, path: Path) -> int | None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        # Its time says when it was last used.
        with contextlib.suppress(OSError):
            os.utime(descriptor)
        return descriptor

    def _fetched(self, path: Path, size: int, fetch: Callable[[int], None]) -> int:
        temporary = self.folder / f".{path.name}.tmp"
        try:
            with self._locked("all"):
                self._make_room(size, temporary)
                descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
                # Others that make room must see it, and a full disk must show before the download.
                os.posix_fallocate(descriptor, 0, max(size, 1))
            try:
                fetch(descriptor)
                temporary.replace(path)
            except BaseException:
                os.close(descriptor)
                raise
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return descriptor

    def _make_room(self, size: int, temporary: Path) -> None:
        files: list[tuple[int, int, Path]] = []
        for path in self.folder.iterdir():
            if path == temporary or path.suffix == ".lock":
                continue
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(length for _, length, _ in files)
        for _, length, path in sorted(files):
            if total + size <= self.limit:
                return
            # What is being downloaded, or was when a run was killed.
            if path.suffix == ".tmp" and not self._abandoned(path):
                continue
            path.unlink(missing_ok=True)
            total -= length

    def _abandoned(self, temporary: Path) -> bool:
        """Return whether no process holds the lock of this download."""
        with (self.folder / f"{temporary.name.removesuffix('.tmp')}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.folder / f".{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                # Closing it is not enough: a worker forked meanwhile has the file open too.
                fcntl.flock(file, fcntl.LOCK_UN)


class RemoteShard:
    """An archive on a web server; asks it once for size and version.

    Args:
        url: Where it is.
        store: Where copies are kept.

    Raises:
        DataError: It cannot be had, or the server does not say how large it is.
    """

    def __init__(self, url: str, store: Store) -> None:
        self.url = url
        self.shown = shown(url)
        self._store = store
        try:
            self.size, self._version = ask(url, self._state, "HEAD")
        except DataError as error:
            # A URL may be signed for GET only; the connection is closed before the content comes.
            if _status(error) not in (400, 403, 405, 501):
                raise
            self.size, self._version = ask(url, self._state)
        # A signed URL has another query every time; one without a version may choose the file by it.
        place = self.shown if self._version else url
        self.identity = f"{place}\0{self.size}\0{self._version}"
        self._name = f"{hashlib.sha256(self.identity.encode()).hexdigest()[:32]}.tar"

    def local(self) -> int:
        """Return an open file descriptor of a local copy, made when there is none; errors as in `Shard`."""
        return self._store.open(self._name, self.size, self._download)

    def _download(self, descriptor: int) -> None:
        def save(answer: http.client.HTTPResponse) -> None:
            if self._state(answer) != (self.size, self._version):
                raise DataError(
                    f"data=shards: {self.shown} has changed since this run began\n  start again to read it anew"
                )
            offset = 0
            while chunk := answer.read(_CHUNK):
                offset += self._store.write(descriptor, chunk, offset)
            if offset != self.size:
                raise http.client.IncompleteRead(b"", self.size - offset)

        ask(self.url, save)

    def _state(self, answer: http.client.HTTPResponse) -> tuple[int, str]:
        length = answer.headers.get("Content-Length") or ""
        if not length.isdecimal():
            raise DataError(
                f"data=shards: the server does not say how large {self.shown} is\n"
                "  use a server that sends Content-Length, or local files"
            )
        return int(length), answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
