"""A folder of pictures, one folder a class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cvtrain.data.base import EncodedDataSet
from cvtrain.data.collection import Collection, Files, Part
from cvtrain.data.picture import printable
from cvtrain.data.scan import Scan, scan
from cvtrain.errors import ConfigError, DataError

NATIVE_SIZE = 224


@dataclass(kw_only=True)
class Folder(EncodedDataSet):
    """`root/CLASS/**/picture`, or the same below `root/train`, `root/val` and `root/test`.

    The classes are those of training, sorted; val and test are mapped to them by name. A missing val or test split is
    carved from training, stratified.

    Attributes:
        root: The folder; it is never written to.
    """

    root: str | None = None

    def __post_init__(self) -> None:
        """Check the settings; errors as in `DataSet`."""
        super().__post_init__()
        if self.root is None:
            raise ConfigError("data=folder: which folder?\n  give it with data.root=DIR")

    def read(self) -> Collection:
        """Find classes and pictures; errors as in `DataSet.read`."""
        root = str(self.root)
        found = scan(root)
        class_names = self._classes(found)
        parts = folder_parts(root, found, class_names)
        names = [printable(name) for name in class_names]
        return Collection("folder", names, self.channels, NATIVE_SIZE, parts, found.notes)

    def _classes(self, found: Scan) -> list[str]:
        train_name = "train" if "train" in found.splits else ""
        empty = [name for name, paths in found.splits[train_name].items() if not paths]
        if empty and not self.allow_empty:
            where = "/".join(part for part in (printable(found.root), train_name, printable(empty[0])) if part)
            raise DataError(
                f"data=folder: class {printable(empty[0])!r} holds no picture: {where}\n"
                "  add pictures or remove the folder (a folder reached twice by links is read once), or accept it with "
                "data.allow_empty=true"
            )
        return list(found.splits[train_name])


def folder_parts(root: str, found: Scan, class_names: list[str]) -> dict[str, Part]:
    """Return the splits that are there, labelled by the position of the class in `class_names`.

    Raises:
        DataError: A class of val or test is not in `class_names`.
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    parts = {}
    for split, classes in found.splits.items():
        strange = [name for name, paths in classes.items() if paths and name not in numbers]
        if strange:
            raise DataError(
                f"data=folder: class {printable(strange[0])!r} is in {split} but not in train\n"
                f"  train has: {', '.join(printable(name) for name in class_names[:20])}; "
                "add it to train or remove it"
            )
        missing = [printable(name) for name in class_names if not classes.get(name)]
        if missing:
            found.notes.append(
                f"{split or 'training'} has no picture of {len(missing)} class(es): {', '.join(missing[:10])}"
            )
        pairs = [(path, numbers[name]) for name, paths in classes.items() for path in paths]
        paths = [path for path, _ in pairs]
        labels = np.array([number for _, number in pairs], np.int64)
        parts[split or "train"] = Part(Files(root, paths), labels, [printable(path) for path in paths])
    return parts
