"""`cvtrain predict run=FOLDER source=PICTURES`: classes and calibrated probabilities, one row a picture."""

from __future__ import annotations

import csv
import glob
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from cvtrain.command.predictor import Prediction, Predictor
from cvtrain.core.files import storage_error, sync_folder, to_json_line
from cvtrain.core.folders import files_below, is_picture
from cvtrain.core.picture import printable
from cvtrain.errors import EXIT_OK, ConfigError, DataError

FORMATS = ("csv", "json", "jsonl")
STDIN = "-"


def run(config: dict[str, Any], trusted: list[str]) -> int:
    """Write the predictions as they are made; every picture that can be read is answered, every other one named.

    Args:
        config: Of the verb.
        trusted: The user's own packages.

    Returns:
        The exit code: 3 when a picture could not be read, unless `on_error=skip`.

    Raises:
        ConfigError: Contradicting keys, or what `Predictor` refuses.
        DataError: A source does not exist, or there is no picture at all.
        WeightsError: The file is missing or damaged.
    """
    format_ = _format(config)
    sources = config["source"] if isinstance(config["source"], list) else [config["source"]]
    _refuse_missing(str(source) for source in sources if source != STDIN)
    predictor = Predictor(_model(config), str(config["artifact"]), config["threads"], config["device"], trusted)
    if predictor.channels not in (1, 3):
        raise ConfigError(
            f"this model takes {predictor.channels} channels; predict reads pictures of 1 or 3. "
            "Measure it with cvtrain val on its own data."
        )
    topk = min(int(config["topk"]), len(predictor.class_names))
    told = _Told()
    pictures = (path for source in sources for path in find_pictures(str(source), told.folder))
    rows = (row(answer) for answer in told.answered(predictor.stream(pictures, int(config["batch_size"]), topk)))
    text = _WRITERS[format_](rows, predictor.multilabel, topk)
    if config["output"] is None:
        for piece in text:
            sys.stdout.write(piece)
            sys.stdout.flush()
    else:
        _write(Path(str(config["output"])), text)
    return told.settle(config["on_error"])


def row(answer: Prediction) -> dict[str, Any]:
    """Return `file`, `label`, `probability` and, above one, the further classes of a picture, likeliest first.

    A multi-label model adds `labels`: all with a probability of 0.5 or more, in the order of the class list.
    """
    found: dict[str, Any] = {"file": answer.name}
    if answer.labels is not None:
        found["labels"] = list(answer.labels)
    for rank, (label, probability) in enumerate(answer.classes):
        mark = "" if rank == 0 else f"_{rank + 1}"
        found |= {f"label{mark}": label, f"probability{mark}": round(probability, 6)}
    return found


def find_pictures(source: str, on_folder: Callable[[OSError], None]) -> Iterator[str]:
    """Yield the pictures that a source stands for, one folder's names in memory at a time.

    Args:
        source: A file; a folder, with those below it; a pattern; or `-`, standard input with one file a line.
        on_folder: Called when a folder cannot be read.
    """
    if source == STDIN:
        for line in sys.stdin.buffer:
            if path := line.rstrip(b"\r\n"):
                yield os.fsdecode(path)
        return
    found = [source] if os.path.lexists(source) else sorted(glob.iglob(source, recursive=True))  # noqa: PTH207
    visited: set[tuple[int, int]] = set()
    for path in found:
        if not Path(path).is_dir():
            yield path
        elif "**" not in source:  # which has matched what is in the folder too
            yield from (file for file in files_below(path, visited, on_folder) if is_picture(file))


class _Told:
    """Says on standard error what could not be read, and counts."""

    def __init__(self) -> None:
        self.seen = self.failed = 0

    def answered(self, answers: Iterable[Prediction]) -> Iterator[Prediction]:
        """Yield the answers without those that are errors."""
        for answer in answers:
            self.seen += 1
            if answer.error is None:
                yield answer
            else:
                self._say(answer.error)
        if not self.seen:
            raise DataError("no picture there. Give pictures, a folder that holds some, or a pattern in quotes.")

    def folder(self, error: OSError) -> None:
        """Name a folder that cannot be read."""
        self.seen += 1
        self._say(f"{printable(str(error.filename))}: {error.strerror}")

    def settle(self, on_error: str) -> int:
        """Say how many could not be read; return the exit code."""
        if not self.failed:
            return EXIT_OK
        fix = "" if on_error == "skip" else "; on_error=skip makes that no error"
        sys.stderr.write(f"cvtrain: {self.failed} of {self.seen} could not be read, all others are answered{fix}\n")
        return EXIT_OK if on_error == "skip" else DataError.exit_code

    def _say(self, message: str) -> None:
        self.failed += 1
        sys.stderr.write(f"cvtrain: {message}\n")


def _format(config: dict[str, Any]) -> str:
    """Return `csv`, `json` or `jsonl`, after a look at what is given."""
    if config["source"] is None:
        raise ConfigError(
            "give source=PICTURE, a folder, a pattern such as source='photos/*.jpg', a list of them, or - for a list "
            "of paths on standard input."
        )
    output, asked = config["output"], "json" if config["json"] else config["format"]
    ending = None if output is None else Path(str(output)).suffix.removeprefix(".")
    if ending is not None and ending not in FORMATS:
        raise ConfigError(f"output={output} must end in {', '.join(f'.{name}' for name in FORMATS)}.")
    if asked != "auto" and ending not in (None, asked):
        raise ConfigError(f"output={output} is not {asked}: end it in .{asked}, or leave format= and json= out.")
    return ending or (FORMATS[0] if asked == "auto" else str(asked))


def _model(config: dict[str, Any]) -> str:
    given = [config[key] for key in ("run", "weights") if config[key] is not None]
    if len(given) != 1:
        raise ConfigError(
            "give one of run=FOLDER (the folder that a run printed) and weights=FILE (a model.safetensors, .onnx, …)."
        )
    if isinstance(given[0], list) or isinstance(config["artifact"], list):
        raise ConfigError("predict takes one run and one artifact; an ensemble is measured with cvtrain val.")
    if config["run"] is not None and not Path(str(given[0])).is_dir():
        raise ConfigError(f"run={given[0]} is not a folder. Use the folder that a run printed, or weights=FILE.")
    return str(given[0])


def _refuse_missing(sources: Iterable[str]) -> None:
    for source in sources:
        if not os.path.lexists(source) and next(glob.iglob(source, recursive=True), None) is None:  # noqa: PTH207
            raise DataError(
                f"source={source}: no picture there. Give a picture, a folder that holds some, or a pattern in quotes."
            )


def _csv(rows: Iterable[dict[str, Any]], multilabel: bool, topk: int) -> Iterator[str]:
    marks = ["", *(f"_{i + 1}" for i in range(1, topk))]
    classes = [f"{kind}{mark}" for mark in marks for kind in ("label", "probability")]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["file", *(["labels"] * multilabel), *classes], lineterminator="\n")
    writer.writeheader()
    for each in rows:
        writer.writerow({**each, "labels": "|".join(each["labels"])} if multilabel else each)
        yield text.getvalue()
        text.seek(0)
        text.truncate()
    yield text.getvalue()


def _json(rows: Iterable[dict[str, Any]], multilabel: bool, topk: int) -> Iterator[str]:
    before = "["
    for each in rows:
        yield before + to_json_line(each)
        before = ", "
    yield "[]\n" if before == "[" else "]\n"


def _jsonl(rows: Iterable[dict[str, Any]], multilabel: bool, topk: int) -> Iterator[str]:
    return (to_json_line(each) + "\n" for each in rows)


_WRITERS = {"csv": _csv, "json": _json, "jsonl": _jsonl}


def _write(path: Path, text: Iterable[str]) -> None:
    """Write to `path.part`, which grows as the answers come and gets its name when they are all there.

    Raises:
        StorageError: The disk is full or read-only.
    """
    part = path.with_name(f"{path.name}.part")
    pieces = iter(text)
    first = next(pieces, "")  # where there is nothing to write, no file is begun
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            for piece in chain([first], pieces):
                file.write(piece)
                file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
