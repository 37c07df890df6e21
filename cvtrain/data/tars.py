"""Pictures inside tar archives (WebDataset's shards), read by their place in the file; nothing is ever unpacked."""

from __future__ import annotations

import json
import os
import re
import stat
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cvtrain.data.collection import Indices
from cvtrain.data.picture import check_picture, extensions, printable
from cvtrain.errors import DataError

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
"""As WebDataset has it: the key goes up to the first dot of the base name, the rest is the extension."""

_BLOCK = 512
_LONGEST_CLASS = 64


class Shard(Protocol):
    """One archive, wherever it lies."""

    shown: str
    """Path or URL, for messages."""
    identity: str
    """A text that changes when the archive does."""
    size: int
    """Bytes."""

    def local(self) -> int:
        """Return an open file descriptor of the archive; the caller closes it.

        Raises:
            DataError: It cannot be had.
        """
        ...


class LocalShard:
    """An archive on this machine.

    Args:
        path: The file.

    Raises:
        DataError: There is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shown = printable(os.fspath(path))
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(
                f"data=shards: {self.shown}: {error.strerror or error}\n  give tar files with data.root"
            ) from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"data=shards: {self.shown} is not a regular file\n  give tar files with data.root")
        self.size = status.st_size
        self.mtime_ns = status.st_mtime_ns
        self.identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"

    def local(self) -> int:
        """Return an open file descriptor; errors as in `Shard`."""
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{self.shown}: {error.strerror or error}") from error


@dataclass
class Index:
    """Where the labelled pictures of one shard are.

    Attributes:
        keys: N names of samples.
        extensions: N extensions of their pictures.
        offsets: `(N,)` int64 first byte of each picture.
        sizes: `(N,)` int64 bytes of each picture.
        labels: `(N,)` int64 class numbers.
        wrong: What is not a sample with one picture and one class, a text each.
        bad: Position -> reason, of pictures that cannot be read; None when they were not looked at.
    """

    keys: list[str] = field(default_factory=list)
    extensions: list[str] = field(default_factory=list)
    offsets: Indices = field(default_factory=lambda: np.empty(0, np.int64))
    sizes: Indices = field(default_factory=lambda: np.empty(0, np.int64))
    labels: Indices = field(default_factory=lambda: np.empty(0, np.int64))
    wrong: list[str] = field(default_factory=list)
    bad: dict[int, str] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON: a row a sample, of key, extension, offset, size and label."""
        numbers = (self.offsets.tolist(), self.sizes.tolist(), self.labels.tolist())
        bad = None if self.bad is None else {str(position): reason for position, reason in self.bad.items()}
        rows = [list(row) for row in zip(self.keys, self.extensions, *numbers, strict=True)]
        return {"samples": rows, "wrong": self.wrong, "bad": bad}

    @staticmethod
    def from_dict(content: Any, size: int) -> Index:  # noqa: ANN401 - any JSON value
        """Rebuild from `to_dict`'s JSON.

        Args:
            content: The JSON value.
            size: Bytes of the shard.

        Raises:
            KeyError, TypeError, ValueError: It is something else, or points outside the shard.
        """
        samples = content["samples"]
        rows = [(str(key), str(end), int(at), int(length), int(label)) for key, end, at, length, label in samples]
        numbers = np.array([row[2:] for row in rows], np.int64).reshape(-1, 3)
        if (numbers[:, :2] < 0).any() or (numbers[:, 0] + numbers[:, 1] > size).any():
            raise ValueError("a picture outside the shard")
        bad = content["bad"]
        return Index(
            [row[0] for row in rows],
            [row[1] for row in rows],
            numbers[:, 0].copy(),
            numbers[:, 1].copy(),
            numbers[:, 2].copy(),
            wrong=[str(text) for text in content["wrong"]],
            bad=None if bad is None else {int(position): str(reason) for position, reason in bad.items()},
        )


class TarPictures:
    """Pictures of several shards.

    Args:
        shards: The archives.
        which: `(N,)` int64 position in `shards`.
        spans: `(N, 2)` int64 offset and size in bytes.
        names: N names inside the archives.
    """

    def __init__(self, shards: Sequence[Shard], which: Indices, spans: Indices, names: Sequence[str]) -> None:
        self._shards = shards
        self._which = which
        self._spans = spans
        self._names = list(names)

    def __len__(self) -> int:
        """Return N."""
        return len(self._which)

    def content(self, index: int) -> bytes:
        """Return the bytes; errors as in `Encoded`."""
        offset, size = (int(number) for number in self._spans[index])
        try:
            descriptor = self._shard(index).local()
            try:
                content = read_at(descriptor, offset, size)
            finally:
                os.close(descriptor)
        except (OSError, DataError) as error:
            raise DataError(f"{self.place(index)}: {getattr(error, 'strerror', None) or error}") from error
        if len(content) < size:
            raise DataError(f"{self.place(index)}: the shard ends before byte {offset + size}")
        return content

    def place(self, index: int) -> str:
        """Return shard and name."""
        return f"{self._shard(index).shown}:{self._names[index]}"

    def identity(self, index: int) -> str:
        """Return shard and offset, which sort as they lie in the file."""
        return f"{self._shard(index).identity}\0{int(self._spans[index, 0]):015d}\0{int(self._spans[index, 1])}"

    def only(self, keep: Indices) -> TarPictures:
        """Return these positions."""
        names = [self._names[int(index)] for index in keep]
        return TarPictures(self._shards, self._which[keep], self._spans[keep], names)

    def _shard(self, index: int) -> Shard:
        return self._shards[int(self._which[index])]


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """Return `size` bytes from `offset` on, fewer at the end of the file."""
    parts = []
    while size > 0 and (part := os.pread(descriptor, size, offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


@dataclass
class _Sample:
    pictures: list[tuple[str, int, int]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    links: int = 0


def index_tar(shard: Shard, max_pixels: int | None = None) -> Index:
    """Find the samples of a shard by its headers.

    Args:
        shard: The archive.
        max_pixels: Also decode each picture, with this limit of width × height; None leaves them unread.

    Raises:
        DataError: It is no tar archive, compressed, or truncated.
    """
    descriptor = shard.local()
    try:
        samples = _samples(shard, descriptor)
        index = _labelled(samples)
        if max_pixels is not None:
            index.bad = {}
            for position, (offset, size) in enumerate(zip(index.offsets.tolist(), index.sizes.tolist(), strict=True)):
                try:
                    check_picture(read_at(descriptor, offset, size), max_pixels)
                except DataError as error:
                    index.bad[position] = str(error).partition(": ")[2]
    finally:
        os.close(descriptor)
    return index


def _samples(shard: Shard, descriptor: int) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    size = os.fstat(descriptor).st_size
    try:
        with os.fdopen(os.dup(descriptor), "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                _add(samples, member, descriptor)
                # Kept for look-ups by name, which nobody does here.
                archive.members = []  # type: ignore[attr-defined]
                end = archive.offset
                if end > size:
                    raise tarfile.ReadError(f"{member.name} goes on to byte {end} of {size}")
            end = archive.offset
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise DataError(
            f"data=shards: {shard.shown}: truncated, damaged, or no uncompressed tar file: {error}\n"
            "  copy or download it again; a compressed one must be unpacked to .tar first"
        ) from error
    # tarfile takes any nonsense behind the first member for the end; what was cut off would go unnoticed.
    if read_at(descriptor, end, _BLOCK) != bytes(_BLOCK):
        raise DataError(
            f"data=shards: {shard.shown}: truncated or damaged at byte {end} of {size}: no mark of the archive's end\n"
            "  copy or download it again"
        )
    return samples


def _add(samples: dict[str, _Sample], member: tarfile.TarInfo, descriptor: int) -> None:
    found = _NAME.fullmatch(member.name)
    # Names that begin with two underscores are WebDataset's own notes.
    if found is None or member.isdir() or member.name.startswith("__"):
        return
    sample = samples.setdefault(found[1], _Sample())
    extension = found[2].lower()
    if not member.isreg() or member.issparse():
        sample.links += f".{extension}" in extensions() or extension == "cls"
    elif f".{extension}" in extensions():
        sample.pictures.append((found[2], member.offset_data, member.size))
    elif extension == "cls":
        content = read_at(descriptor, member.offset_data, min(member.size, _LONGEST_CLASS))
        sample.classes.append(content.decode("utf-8", "backslashreplace").strip())


def _labelled(samples: dict[str, _Sample]) -> Index:
    index = Index()
    numbers: list[tuple[int, int, int]] = []
    for key, sample in samples.items():
        # A file that has nothing to do with pictures.
        if sample == _Sample():
            continue
        reason = _reason(sample)
        if reason is not None:
            index.wrong.append(f"{printable(key)}: {reason}")
            continue
        (extension, offset, size), label = sample.pictures[0], int(sample.classes[0])
        index.keys.append(printable(key))
        index.extensions.append(printable(extension))
        numbers.append((offset, size, label))
    table = np.array(numbers, np.int64).reshape(-1, 3)
    index.offsets, index.sizes, index.labels = table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy()
    return index


def _reason(sample: _Sample) -> str | None:
    """Return why it is no sample of one picture and one class."""
    if sample.links:
        return "a link or special file, which is not followed"
    if len(sample.pictures) != 1:
        return "several pictures" if sample.pictures else "no picture"
    if len(sample.classes) != 1:
        return "several .cls files" if sample.classes else "no .cls file"
    if not sample.classes[0].isdecimal() or len(sample.classes[0]) > 9:
        return f"class {sample.classes[0][:20]!r} in .cls, expected a whole number"
    return None


def index_json(shards: dict[str, tuple[int, Index]], class_names: list[str], max_pixels: int) -> str:
    """Return the text of an `index.json`.

    Args:
        shards: File name -> bytes and index.
        class_names: K names.
        max_pixels: The limit with which the pictures were decoded when they were written.
    """
    entries = {name: {"size": size, **index.to_dict()} for name, (size, index) in shards.items()}
    return json.dumps({"format": INDEX_FORMAT, "classes": class_names, "max_pixels": max_pixels, "shards": entries})


INDEX_FORMAT = "cvtrain-shards-1"
