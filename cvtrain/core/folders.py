"""The pictures below a folder, by their names; torch-free, nothing is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from cvtrain.core.picture import extensions

_SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx"}


def listing(folder: str) -> tuple[list[str], list[str]]:
    """Return the names of folders and of other entries, sorted, hidden and system ones left out.

    Raises:
        OSError: It is no folder, or may not be read.
    """
    folders: list[str] = []
    others: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FILES:
                continue
            try:
                is_folder = entry.is_dir()
            # A link to itself.
            except OSError:
                is_folder = False
            (folders if is_folder else others).append(entry.name)
    return sorted(folders), sorted(others)


def files_below(
    folder: str, visited: set[tuple[int, int]], on_error: Callable[[OSError], None] | None = None
) -> Iterator[str]:
    """Yield the paths of the files below `folder`, sorted, following links but entering no real folder twice.

    No more names are held than those of one folder and of the folders above it.

    Args:
        folder: The folder, the beginning of all paths.
        visited: Real folders not to enter; those that are entered are added.
        on_error: Called when a folder cannot be read, which is then left out; None: the error is raised.

    Raises:
        OSError: A folder cannot be read.
    """
    # With the separator that follows it in all paths below, a folder comes where its files belong.
    pending = [os.path.join(folder, "")]  # noqa: PTH118 - may be no text
    while pending:
        path = pending.pop()
        if not path.endswith(os.sep):
            yield path
            continue
        try:
            identity = identity_of(path)
            if identity in visited:
                continue
            visited.add(identity)
            inner, files = listing(path.rstrip(os.sep) or os.sep)
        except OSError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        pending += [path + name for name in sorted([*(name + os.sep for name in inner), *files], reverse=True)]


def identity_of(folder: str) -> tuple[int, int]:
    """Return what tells a real folder from all others, however it is reached."""
    status = os.stat(folder)  # noqa: PTH116 - may be no text
    return status.st_dev, status.st_ino


def is_picture(name: str) -> bool:
    """Return whether a file is a picture by its name."""
    return os.path.splitext(name)[1].lower() in extensions()  # noqa: PTH122 - may be no text
