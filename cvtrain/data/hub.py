"""Data sets of Hugging Face's `datasets` library: saved in a folder, in its cache, or on the Hub."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvtrain.core.extras import import_extra
from cvtrain.data.base import EncodedDataSet
from cvtrain.data.collection import Collection, Indices, Part
from cvtrain.data.picture import printable
from cvtrain.data.scan import SPLITS
from cvtrain.errors import ConfigError, DataError, did_you_mean

NATIVE_SIZE = 224


class _Rows:
    """Pictures in a column of a table.

    Args:
        table: A `datasets.Dataset` whose column is not decoded.
        column: Its name.
        place: What the table is called in messages.
        identity: A text that changes when the table does.
        where: `(N,)` rows; None means all.
    """

    def __init__(self, table: Any, column: str, place: str, identity: str, where: Indices | None = None) -> None:  # noqa: ANN401
        self._table = table
        self._column = column
        self._place = place
        self._identity = identity
        self._where = np.arange(len(table), dtype=np.int64) if where is None else where

    def __len__(self) -> int:
        """Return N."""
        return len(self._where)

    def content(self, index: int) -> str | bytes:
        """Return the bytes that the table holds, or the path of a file; errors as in `Encoded`."""
        cell = self._table[int(self._where[index])][self._column]
        content = None if cell is None else cell.get("bytes") or cell.get("path")
        if not isinstance(content, (str, bytes)):
            raise DataError(f"{self.place(index)}: no picture in this row")
        return content

    def place(self, index: int) -> str:
        """Return table and row."""
        return f"{self._place}[{int(self._where[index])}]"

    def identity(self, index: int) -> str:
        """Return table and row."""
        return f"{self._identity}\0{int(self._where[index]):012d}"

    def only(self, keep: Indices) -> _Rows:
        """Return these positions."""
        return _Rows(self._table, self._column, self._place, self._identity, self._where[keep])


@dataclass(kw_only=True)
class HuggingFace(EncodedDataSet):
    """A data set with a column of pictures and one of classes; splits other than train, validation and test are unused.

    Attributes:
        name: A folder written by `save_to_disk`, or a name on the Hub.
        image_column: Column of the pictures; null: the only one there is.
        label_column: Column of the classes: ClassLabel, text or whole numbers; null: the only ClassLabel.
        download: Let `datasets` ask the Hub; otherwise no connection is made.
    """

    name: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    download: bool = False

    def read(self) -> Collection:
        """Open the tables; errors as in `DataSet.read`."""
        if self.name is None:
            raise ConfigError("data=hf: which data set?\n  give a folder or a name on the Hub with data.name=…")
        notes: list[str] = []
        splits = self._splits(notes)
        image, label = self._columns(splits["train"])
        stored = {split: _column(table, label, f"{self._shown}/{split}") for split, table in splits.items()}
        for split in ("val", "test"):
            # Competitions publish their test pictures without classes.
            if split in stored and all(value is None or value == -1 for value in stored[split]):
                del stored[split]
                notes.append(f"the {split} split has no labels and is left out")
        names, numbers = self._classes(splits["train"], label, stored["train"])
        parts = {}
        for split, values in stored.items():
            labels = self._numbered(values, numbers, split, label)
            rows = self._rows(splits[split], image, split)
            parts[split] = Part(rows, labels, [f"{split}/{row}" for row in range(len(labels))])
        notes.append(f"pictures from column {image}, classes from column {label}")
        return Collection("hf", names, self.channels, NATIVE_SIZE, parts, notes)

    @property
    def _shown(self) -> str:
        return printable(str(self.name))

    def _splits(self, notes: list[str]) -> dict[str, Any]:
        """Return the tables by split."""
        loaded = self._loaded()
        tables = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
        splits: dict[str, Any] = {}
        for name, table in tables.items():
            split = SPLITS.get(str(name).lower())
            if split is None or split in splits:
                notes.append(f"split {name!r} is left out")
            else:
                splits[split] = table
        if "train" not in splits:
            raise DataError(
                f"data=hf: {self._shown} has no train split, but {', '.join(map(str, tables))}\n"
                "  choose another data set, or save one with a split named train"
            )
        return splits

    def _loaded(self) -> Any:  # noqa: ANN401 - a Dataset or a DatasetDict
        datasets = import_extra("datasets", "data=hf", "hf")
        name = str(self.name)
        is_folder = Path(name).is_dir()
        try:
            with _connected(self.download and not is_folder):
                return datasets.load_from_disk(name) if is_folder else datasets.load_dataset(name)
        # The library raises what its many backends raise.
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            fix = "check the name; for a private one log in with: hf auth login"
            if is_folder:
                fix = "give a folder written by save_to_disk"
            elif not self.download:
                fix = "not a folder here, nor in the cache of datasets: download it with data.download=true"
            raise DataError(f"data=hf: {self._shown}: {reason}\n  {fix}") from error

    def _columns(self, table: Any) -> tuple[str, str]:  # noqa: ANN401 - a Dataset
        """Return the names of the columns of pictures and classes."""
        import datasets

        chosen = []
        for key, given, kind in (
            ("image_column", self.image_column, datasets.Image),
            ("label_column", self.label_column, datasets.ClassLabel),
        ):
            fitting = [name for name, feature in table.features.items() if isinstance(feature, kind)]
            if given is None and len(fitting) != 1:
                held = ", ".join(f"{name} ({_kind(feature)})" for name, feature in table.features.items())
                raise DataError(
                    f"data=hf: {self._shown} has {len(fitting) or 'no'} columns of type {kind.__name__}: {held}\n"
                    f"  choose one with data.{key}=NAME"
                )
            name = fitting[0] if given is None else str(given)
            if name not in table.features:
                raise ConfigError(f"data.{key}={name}: {did_you_mean(name, table.features, 'columns')}")
            chosen.append(name)
        if not isinstance(table.features[chosen[0]], datasets.Image):
            held = _kind(table.features[chosen[0]])
            raise ConfigError(f"data.image_column={chosen[0]} holds {held}\n  allowed: a column of type Image")
        return chosen[0], chosen[1]

    def _classes(self, table: Any, column: str, stored: list[Any]) -> tuple[list[str], dict[Any, int]]:  # noqa: ANN401
        """Return the class names, and stored value -> position in them."""
        feature = table.features[column]
        if hasattr(feature, "names"):
            return [printable(name) for name in feature.names], {number: number for number in range(len(feature.names))}
        values = {value for value in stored if value is not None}
        if not all(isinstance(value, str) for value in values) and not all(type(value) is int for value in values):
            raise ConfigError(
                f"data.label_column={column} holds {_kind(feature)}\n  allowed: ClassLabel, text or whole numbers"
            )
        kept = sorted(values)
        return [printable(str(value)) for value in kept], {value: number for number, value in enumerate(kept)}

    def _numbered(self, values: list[Any], numbers: dict[Any, int], split: str, column: str) -> NDArray[np.int64]:
        wrong = [row for row, value in enumerate(values) if value not in numbers]
        if wrong:
            raise DataError(
                f"data=hf: {len(wrong)} row(s) of {split} have a {column} that is no class of training, first "
                f"{values[wrong[0]]!r} in row {wrong[0]}\n"
                "  remove these rows"
            )
        return np.array([numbers[value] for value in values], np.int64)

    def _rows(self, table: Any, column: str, split: str) -> _Rows:  # noqa: ANN401 - a Dataset
        import datasets

        files = []
        for file in table.cache_files:
            status = os.stat(file["filename"])  # noqa: PTH116 - named by the library
            files.append((file["filename"], status.st_size, status.st_mtime_ns))
        plain = table.select_columns([column]).cast_column(column, datasets.Image(decode=False)).with_format(None)
        identity = f"{self._shown}\0{split}\0{getattr(table, '_fingerprint', '')}\0{files}"
        return _Rows(plain, column, f"{self._shown}/{split}", identity)


def _column(table: Any, name: str, place: str) -> list[Any]:  # noqa: ANN401 - a Dataset
    if name not in table.features:
        raise DataError(f"data=hf: {place} has no column {name}\n  it must have those of train")
    values: list[Any] = table.select_columns([name]).with_format(None)[:][name]
    unhashable = [value for value in values[:1] if isinstance(value, (list, dict))]
    if unhashable:
        raise ConfigError(f"data.label_column={name} holds {type(unhashable[0]).__name__}s\n  allowed: one class a row")
    return values


def _kind(feature: object) -> str:
    name = type(feature).__name__
    return str(getattr(feature, "dtype", name)) if name == "Value" else name


@contextlib.contextmanager
def _connected(allowed: bool) -> Iterator[None]:
    """Keep the library from opening a connection unless that is allowed."""
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module, stood in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = stood or not allowed
        yield
    finally:
        for module, stood in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = stood
