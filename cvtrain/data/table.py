"""A table of pictures and labels: CSV."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvtrain.data.base import EncodedDataSet
from cvtrain.data.collection import Collection, Files, Part
from cvtrain.data.picture import printable
from cvtrain.data.scan import SPLITS
from cvtrain.errors import ConfigError, DataError

NATIVE_SIZE = 224
DELIMITERS = ",;\t"
SHOWN = 10
"""Wrong lines that a message names; a file in the run folder names all."""


@dataclass(frozen=True)
class _Row:
    line: int
    path: str
    labels: tuple[str, ...]
    split: str


@dataclass
class _Table:
    """What a file holds: good rows, and a sentence for each wrong line."""

    rows: list[_Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class CSV(EncodedDataSet):
    """A CSV file with the header `path,label` or `path,label,split`, in any order, other columns left out.

    It is UTF-8, delimited by comma, semicolon or tab. Paths are relative to its folder, or absolute. `split` is train,
    val or test; without it, or without val or test, these are carved from training, stratified. The classes are those
    of training, sorted.

    Attributes:
        root: The file.
        label_separator: What stands between the labels of a picture that may have several, or none; null: one label.
    """

    root: str | None = None
    label_separator: str | None = None

    def read(self) -> Collection:
        """Read the table; pictures are looked for, but not opened. Errors as in `DataSet.read`."""
        if self.root is None:
            raise ConfigError("data=csv: which file?\n  give it with data.root=FILE.csv")
        if self.label_separator is not None and not str(self.label_separator).strip():
            raise ConfigError("data.label_separator is empty\n  allowed: text such as | or ;, or null for one label")
        file = Path(self.root)
        table = self._table(file)
        notes = self._repeated(table)
        names = sorted({label for row in table.rows if row.split == "train" for label in row.labels})
        self._judge_rows(file, table, names)
        rows: dict[str, list[_Row]] = {}
        for row in table.rows:
            rows.setdefault(row.split, []).append(row)
        folder = os.fspath(file.parent)
        parts = {
            split: Part(
                Files(folder, [row.path for row in chosen]),
                self._labels(chosen, names),
                [printable(row.path) for row in chosen],
            )
            for split, chosen in rows.items()
        }
        shown = [printable(name) for name in names]
        several = self.label_separator is not None
        return Collection("csv", shown, self.channels, NATIVE_SIZE, parts, notes, several)

    def _table(self, file: Path) -> _Table:
        """Return the rows.

        Raises:
            DataError: No such file, no text, no header, or a column is missing.
        """
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise DataError(
                f"data=csv: {file.absolute()}: {error.strerror or error}\n  give a CSV file with data.root=FILE.csv"
            ) from error
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise DataError(
                f"data=csv: {file.absolute()}: line {line} is not UTF-8 (byte {error.object[error.start]:#04x})\n"
                "  save the file as UTF-8"
            ) from error
        lines = io.StringIO(text, newline=None)
        delimiter, columns = self._header(file, lines.readline())
        table = _Table()
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        line = 2
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    self._add(table, line, cells, columns)
                line = reader.line_num + 2
        except csv.Error as error:
            table.wrong.append(f"line {line}: {error}")
        return table

    def _header(self, file: Path, line: str) -> tuple[str, dict[str, int]]:
        """Return the delimiter and the position of each column."""
        for delimiter in DELIMITERS:
            # Pictures and labels may hold any of these characters; the header says which one separates.
            names = [cell.strip().lower() for cell in next(csv.reader([line], delimiter=delimiter), [])]
            if "path" in names and "label" in names:
                twice = [name for name in ("path", "label", "split") if names.count(name) > 1]
                if twice:
                    raise DataError(f"data=csv: {file.absolute()}: line 1 has {twice[0]} twice\n  keep one column")
                return delimiter, {name: position for position, name in enumerate(names)}
        raise DataError(
            f"data=csv: {file.absolute()}: no columns 'path' and 'label' in line 1: {line.strip()[:80]!r}\n"
            "  the first line must be path,label or path,label,split"
        )

    def _add(self, table: _Table, line: int, cells: list[str], columns: dict[str, int]) -> None:
        wanted = [columns["path"], columns["label"], columns.get("split", 0)]
        if len(cells) <= max(wanted):
            table.wrong.append(f"line {line}: {len(cells)} cell(s) of {len(columns)}")
            return
        path, label = cells[columns["path"]].strip(), cells[columns["label"]].strip()
        stated = cells[columns["split"]].strip() if "split" in columns else "train"
        split = SPLITS.get(stated.lower())
        labels: tuple[str, ...] = (label,)
        if self.label_separator is not None:
            labels = tuple(sorted({part.strip() for part in label.split(str(self.label_separator))} - {""}))
        if not path or "\0" in path:
            table.wrong.append(f"line {line}: no path")
        elif "" in labels:
            table.wrong.append(f"line {line}: no label")
        elif split is None:
            table.wrong.append(f"line {line}: split {stated!r}, expected train, val or test")
        else:
            table.rows.append(_Row(line, path, labels, split))

    def _repeated(self, table: _Table) -> list[str]:
        """Keep each picture once; one that has two labels or is in two splits is wrong."""
        first: dict[str, _Row] = {}
        again: list[int] = []
        for row in table.rows:
            before = first.setdefault(os.path.normpath(row.path), row)
            if before is row:
                continue
            if before.labels != row.labels:
                table.wrong.append(
                    f"line {row.line}: {printable(row.path)} is {_said(row.labels)}, but {_said(before.labels)} in "
                    f"line {before.line}"
                )
            elif before.split != row.split:
                table.wrong.append(
                    f"line {row.line}: {printable(row.path)} is in {row.split}, and in {before.split} in line "
                    f"{before.line}"
                )
            else:
                again.append(row.line)
        table.rows = list(first.values())
        shown = ", ".join(str(line) for line in again[:SHOWN]) + (", …" if len(again) > SHOWN else "")
        return [f"{len(again)} line(s) repeat an earlier picture and are left out: line {shown}"] if again else []

    def _judge_rows(self, file: Path, table: _Table, names: Sequence[str]) -> None:
        """Stop when a line is wrong; a missing picture only where no picture may be left out."""
        known = set(names)
        for row in table.rows:
            strange = [label for label in row.labels if label not in known]
            if strange:
                table.wrong.append(f"line {row.line}: label {strange[0]!r} of {row.split} is not in train")
            if self.on_error == "fail" and not os.path.isfile(file.parent / row.path):  # noqa: PTH113
                table.wrong.append(f"line {row.line}: no file {printable(row.path)}")
        if table.wrong:
            wrong = sorted(table.wrong, key=lambda text: int(text.split()[1].rstrip(":")))
            more = f"; … and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            error = DataError(
                f"data=csv: {file.absolute()}: {len(wrong)} wrong line(s): {'; '.join(wrong[:SHOWN])}{more}\n"
                "  correct or remove them; paths count from the folder of the CSV file"
            )
            error.details = wrong
            raise error
        if not names and table.rows:
            raise DataError(f"data=csv: {file.absolute()}: no picture for training has a label\n  add labels")
        if "train" not in {row.split for row in table.rows}:
            raise DataError(
                f"data=csv: {file.absolute()}: no picture for training among {len(table.rows)}\n"
                "  add lines below the header, or lines whose split is train"
            )

    def _labels(self, rows: list[_Row], names: Sequence[str]) -> NDArray[Any]:
        numbers = {name: number for number, name in enumerate(names)}
        if self.label_separator is None:
            return np.array([numbers[row.labels[0]] for row in rows], np.int64)
        labels = np.zeros((len(rows), len(names)), np.uint8)
        for position, row in enumerate(rows):
            labels[position, [numbers[label] for label in row.labels]] = 1
        return labels


def _said(labels: Sequence[str]) -> str:
    return repr(", ".join(labels)) if labels else "without a label"
