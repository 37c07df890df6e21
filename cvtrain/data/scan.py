"""Finding the classes and pictures of a folder; nothing is opened, nothing in the folder is changed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from cvtrain.core.folders import files_below, identity_of, is_picture, listing
from cvtrain.core.picture import printable
from cvtrain.errors import DataError

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass
class Scan:
    """What was found.

    Attributes:
        root: The folder.
        splits: Split -> class -> paths relative to `root`, sorted. A folder without splits has one, named "".
        notes: Sentences for the log.
    """

    root: str
    splits: dict[str, dict[str, list[str]]]
    notes: list[str] = field(default_factory=list)


def scan(root: str) -> Scan:
    """Find the splits, classes and pictures below `root`.

    Args:
        root: A folder of classes, or one with `train/` and `val/` (or `valid/`, `validation/`), `test/` of classes.

    Raises:
        DataError: No such folder, no classes, or folders whose role is unclear.
    """
    try:
        return _scan(root)
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else os.path.abspath(root)  # noqa: PTH100
        raise DataError(
            f"data=folder: {printable(where)}: {error.strerror or error}\n"
            "  give a readable folder of one folder a class with data.root=DIR"
        ) from error


def _scan(root: str) -> Scan:
    folders, loose = listing(root)
    result = Scan(root, {})
    for split, name in _layout(root, folders, result.notes).items():
        base = os.path.join(root, name) if name else root  # noqa: PTH118 - may be no text
        classes, here = (folders, loose) if not name else listing(base)
        if not classes:
            raise DataError(_no_classes(base, here))
        ignored: list[str] = []
        result.splits[split] = _pictures(root, base, classes, ignored)
        if ignored:
            result.notes.append(
                f"{len(ignored)} file(s) in {name or 'the folder'} are no pictures by name, such as "
                f"{printable(ignored[0])}"
            )
        stray = [path for path in here if is_picture(path)]
        if stray:
            result.notes.append(
                f"{len(stray)} picture(s) in {printable(base)} lie in no class and are left out, such as "
                f"{printable(stray[0])}"
            )
    return result


def _layout(root: str, folders: list[str], notes: list[str]) -> dict[str, str]:
    """Return split -> folder name; {"": ""} when the folders are classes."""
    named = [name for name in folders if name in SPLITS]
    others = [name for name in folders if name not in SPLITS]
    # "train" beside "car" and "plane" is a class.
    if not named or (others and (len(named) == 1 or "train" not in named)):
        return {"": ""}
    where = printable(root)
    if "train" not in named:
        raise DataError(
            f"data=folder: {where} holds {', '.join(named)} but no train\n"
            "  add a train folder, or give a folder of classes with data.root=DIR"
        )
    layout: dict[str, str] = {}
    for name in sorted(named, key=list(SPLITS).index):
        if SPLITS[name] in layout:
            raise DataError(
                f"data=folder: {where} holds both {layout[SPLITS[name]]} and {name}\n  keep one of them for validation"
            )
        layout[SPLITS[name]] = name
    if others:
        shown = ", ".join(printable(name) for name in others[:5])
        notes.append(f"folders beside {', '.join(named)} are left out: {shown}")
    return layout


def _pictures(root: str, base: str, classes: list[str], ignored: list[str]) -> dict[str, list[str]]:
    """Return class -> paths relative to `root`, following links but entering no real folder twice."""
    visited = {identity_of(root), identity_of(base)}
    found: dict[str, list[str]] = {}
    for name in classes:
        folder = os.path.join(base, name)  # noqa: PTH118 - may be no text
        paths = [os.path.relpath(path, root) for path in files_below(folder, visited)]
        found[name] = sorted(path for path in paths if is_picture(path))
        ignored += [path for path in paths if not is_picture(path)]
    return found


def _no_classes(base: str, here: list[str]) -> str:
    pictures = sum(is_picture(name) for name in here)
    found = f"{pictures} picture(s) lie directly in it" if pictures else "it is empty"
    if here and not pictures:
        found = f"{len(here)} file(s) lie directly in it, no picture among them"
    return (
        f"data=folder: {printable(base)} holds no class folders: {found}\n"
        "  expected DIR/CLASS/picture.jpg, or DIR/train/CLASS/picture.jpg; give DIR with data.root=DIR"
    )
