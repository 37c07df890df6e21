"""What a data set's reader hands over: labelled pictures as they are stored, before splitting, resizing and caching."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cvtrain.data.picture import printable

Indices = NDArray[np.int64]


class Encoded(Protocol):
    """Pictures in files, shards or tables: decoded only when they are read."""

    def __len__(self) -> int:
        """Return how many."""
        ...

    def content(self, index: int) -> str | bytes:
        """Return a path, or the bytes of the file; safe to call from worker processes and threads.

        Raises:
            DataError: It cannot be had; the message begins with its place.
        """
        ...

    def place(self, index: int) -> str:
        """Return where it is, for messages."""
        ...

    def identity(self, index: int) -> str:
        """Return a text that changes when the picture does, found out without reading it."""
        ...

    def only(self, keep: Indices) -> Encoded:
        """Return these positions."""
        ...


class Files:
    """Pictures in files of their own.

    Args:
        root: The folder `paths` are relative to.
        paths: N paths, which need not be text.
    """

    def __init__(self, root: str, paths: Sequence[str]) -> None:
        self.root = root
        self.paths = list(paths)

    def __len__(self) -> int:
        """Return N."""
        return len(self.paths)

    def content(self, index: int) -> str:
        """Return the path."""
        return os.path.join(self.root, self.paths[index])  # noqa: PTH118 - may be no text

    def place(self, index: int) -> str:
        """Return the path as text."""
        return printable(self.content(index))

    def identity(self, index: int) -> str:
        """Return the absolute path, size and times of change; the path alone when there is no such file."""
        path = os.path.abspath(self.content(index))  # noqa: PTH100 - may be no text
        try:
            status = os.stat(path)  # noqa: PTH116 - may be no text
        except OSError:
            return path
        # A copy may keep the other file's modification time, but not the time at which its inode changed.
        return f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"

    def only(self, keep: Indices) -> Files:
        """Return these positions."""
        return Files(self.root, [self.paths[int(index)] for index in keep])


class Joined:
    """Pictures of several origins, one after the other.

    Args:
        parts: In order.
        where: `(N, 2)` part and position in it; None means all.
    """

    def __init__(self, parts: Sequence[Encoded], where: Indices | None = None) -> None:
        self._parts = list(parts)
        if where is None:
            pairs = [(number, index) for number, part in enumerate(parts) for index in range(len(part))]
            where = np.array(pairs, np.int64).reshape(-1, 2)
        self._where = where

    def __len__(self) -> int:
        """Return N."""
        return len(self._where)

    def content(self, index: int) -> str | bytes:
        """Return a path or bytes."""
        part, position = self._at(index)
        return part.content(position)

    def place(self, index: int) -> str:
        """Return where it is."""
        part, position = self._at(index)
        return part.place(position)

    def identity(self, index: int) -> str:
        """Return a text that changes when the picture does."""
        part, position = self._at(index)
        return part.identity(position)

    def _at(self, index: int) -> tuple[Encoded, int]:
        number, position = self._where[index]
        return self._parts[int(number)], int(position)

    def only(self, keep: Indices) -> Joined:
        """Return these positions."""
        return Joined(self._parts, self._where[keep])


@dataclass(frozen=True)
class Part:
    """Labelled pictures.

    Attributes:
        pictures: uint8 `(N, H, W, C)`, or N encoded ones.
        labels: `(N,)` int64 class numbers, or `(N, K)` uint8 of 0 and 1.
        names: N names for predictions.csv and splits.json.
        groups: `(N,)` int64 number of the shard of each picture; None when any order is as quick as any other.
    """

    pictures: NDArray[np.uint8] | Encoded
    labels: NDArray[np.int64]
    names: list[str]
    groups: Indices | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, keep: Indices) -> Part:
        """Return these positions."""
        pictures = self.pictures
        return Part(
            pictures[keep] if isinstance(pictures, np.ndarray) else pictures.only(keep),
            self.labels[keep],
            [self.names[int(index)] for index in keep],
            None if self.groups is None else self.groups[keep],
        )

    def joined(self, other: Part) -> Part:
        """Return this part and `other` behind it; both hold arrays, or neither does."""
        if isinstance(self.pictures, np.ndarray) and isinstance(other.pictures, np.ndarray):
            pictures: NDArray[np.uint8] | Encoded = np.concatenate([self.pictures, other.pictures])
        elif not isinstance(self.pictures, np.ndarray) and not isinstance(other.pictures, np.ndarray):
            pictures = Joined([self.pictures, other.pictures])
        else:
            raise TypeError("arrays and encoded pictures cannot be joined")
        groups = None
        if self.groups is not None and other.groups is not None:
            groups = np.concatenate([self.groups, other.groups + 1 + self.groups.max(initial=-1)])
        return Part(pictures, np.concatenate([self.labels, other.labels]), self.names + other.names, groups)


@dataclass
class Collection:
    """A whole data set as its reader found it.

    Attributes:
        name: Short name for logs and messages.
        class_names: K names, in the order of the labels, frozen from training.
        channels: Channels of the pictures as they are read.
        native_size: Side to train at when none is asked for, in pixels.
        parts: `train`, and `val` and `test` where the set has them; the missing ones are carved from `train`.
        notes: Sentences for the log.
        multilabel: Whether a picture may have several labels, or none.
    """

    name: str
    class_names: list[str]
    channels: int
    native_size: int
    parts: dict[str, Part]
    notes: list[str] = field(default_factory=list)
    multilabel: bool = False
