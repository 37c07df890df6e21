"""What a run folder tells about its run, read without torch; what is missing or damaged is left out."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvtrain import runs
from cvtrain.errors import ConfigError

Row = Mapping[str, str]
_COLUMNS = {
    *("artifact", "file", "runtime", "accuracy", "delta", "delta_low", "delta_high", "agreement", "ece", "params"),
    *("bytes", "latency_ms_p50", "batch", "latency_batch_ms_p50"),
}
"""What a page tells of an artifact."""


@dataclass(frozen=True)
class Predictions:
    """predictions.csv: what was said of N pictures.

    Attributes:
        names: N names of pictures.
        labels: N true classes; of several labels joined by "|".
        predicted: N answers, likewise.
        correct: `(N,)`: whether all of an answer is right.
        confidence: `(N,)` probability of the answer, 0..1; NaN where it is not told.
        stated: `(M,)` probabilities to be judged, 0..1: the confidences; of several labels that of each label.
        happened: `(M,)`: whether each came true.
    """

    names: list[str]
    labels: list[str]
    predicted: list[str]
    correct: NDArray[np.bool_]
    confidence: NDArray[np.float64]
    stated: NDArray[np.float64]
    happened: NDArray[np.bool_]

    def worst(self, count: int) -> list[int]:
        """Return the rows of at most `count` wrong answers, the surest first."""
        wrong = np.flatnonzero(~self.correct)
        order = np.argsort(-np.nan_to_num(self.confidence[wrong]), kind="stable")
        rows: list[int] = wrong[order][:count].tolist()
        return rows


@dataclass(frozen=True)
class RunFiles:
    """A run folder, read.

    Attributes:
        folder: The run folder, absolute.
        manifest: manifest.json, with `config`, `choices`, `versions`, `hardware`, `data`, `git`.
        summary: metrics.json: `metrics`, `intervals_95`, `artifacts`, `winner`; empty of a run that is not finished.
        status: status.json.
        history: results.csv: one row an epoch, NaN where a cell is empty.
        classes: per_class.csv.
        predictions: predictions.csv; None without it.
        overrides: What the command line set; None where that is not known.
        seconds: Training time; None where that is not known.
        temperature: What logits are divided by before they become probabilities; None where that is not known.
    """

    folder: Path
    manifest: dict[str, Any]
    summary: dict[str, Any]
    status: dict[str, Any]
    history: list[dict[str, float]]
    classes: list[Row]
    predictions: Predictions | None
    overrides: list[str] | None
    seconds: float | None
    temperature: float | None

    @property
    def config(self) -> dict[str, Any]:
        """Return the resolved config."""
        config: dict[str, Any] = self.manifest.get("config", {})
        return config

    @property
    def metrics(self) -> dict[str, float]:
        """Return the metrics at the end, such as `test/acc`."""
        return {name: _float(value) for name, value in self.summary.get("metrics", {}).items()}

    @property
    def artifacts(self) -> list[dict[str, Any]]:
        """Return the rows of artifacts.csv with numbers as numbers, the float model first; none of an older cvtrain."""
        rows: list[dict[str, Any]] = self.summary.get("artifacts", [])
        return rows if all(row.keys() >= _COLUMNS for row in rows) else []

    @property
    def class_names(self) -> list[str]:
        """Return the K class names."""
        return [str(name) for name in self.manifest.get("data", {}).get("classes", [])]

    @property
    def multilabel(self) -> bool:
        """Return whether a picture may have several labels."""
        return _multilabel(self.config)

    @property
    def measure(self) -> str:
        """Return what `acc` is called: of several labels all must be right."""
        return "exact match" if self.multilabel else "accuracy"

    def interval(self, metric: str) -> tuple[float, float] | None:
        """Return the 95 % interval of a metric; None where it has none."""
        found = self.summary.get("intervals_95", {}).get(metric)
        return (_float(found[0]), _float(found[1])) if isinstance(found, list) and len(found) == 2 else None

    def column(self, name: str) -> list[float]:
        """Return a column of results.csv, one value an epoch; nothing where there is none."""
        values = [row.get(name, math.nan) for row in self.history]
        return values if any(math.isfinite(value) for value in values) else []

    def best_epoch(self) -> int | None:
        """Return the epoch, from 1, whose row of results.csv the metrics repeat."""
        wanted = {name: value for name, value in self.metrics.items() if name.startswith("val/")}
        for epoch, row in enumerate(self.history, 1):
            if wanted and all(row.get(name) == value for name, value in wanted.items()):
                return epoch
        return None


def read_run(folder: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        ConfigError: It is none.
    """
    manifest = runs.read_json(folder / runs.MANIFEST)
    if "config" not in manifest:
        raise ConfigError(f"run={folder} is not a run folder: no {runs.MANIFEST}. Use the folder that a run printed.")
    trained = _header(folder / "weights" / "last.safetensors").get("cvtrain", "{}")
    temperature = _float(_header(folder / "weights" / "model.safetensors").get("temperature"))
    return RunFiles(
        folder=folder.absolute(),
        manifest=manifest,
        summary=runs.read_json(folder / "metrics.json"),
        status=runs.read_json(folder / runs.STATUS),
        history=[{name: _float(cell) for name, cell in row.items()} for row in _rows(folder / "results.csv")],
        classes=_rows(folder / "per_class.csv"),
        predictions=_predictions(folder / "predictions.csv", _multilabel(manifest["config"])),
        overrides=_overrides(folder / ".hydra" / "overrides.yaml"),
        seconds=json.loads(trained).get("seconds"),
        temperature=temperature if math.isfinite(temperature) else None,
    )


def number(row: Mapping[str, Any], key: str) -> float:
    """Return a cell as a number; NaN where it is missing or none."""
    return _float(row.get(key))


def _float(value: Any) -> float:  # noqa: ANN401 - a cell, or a JSON value
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        return math.nan


def _header(path: Path) -> dict[str, str]:
    """Return the text in a safetensors file, without its tensors; empty where the file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def _overrides(path: Path) -> list[str] | None:
    import yaml

    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return [str(text) for text in found] if isinstance(found, list) else None


def _cells(path: Path) -> Iterator[list[str]]:
    """Yield the lines of a CSV file; none where it is missing or damaged."""
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            yield from csv.reader(file)
    except (OSError, csv.Error):
        return


def _rows(path: Path) -> list[Row]:
    lines = _cells(path)
    heads = next(lines, [])
    return [dict(zip(heads, line, strict=False)) for line in lines]


def _multilabel(config: Mapping[str, Any]) -> bool:
    return str(config.get("task", {}).get("_target_")).endswith(".Multilabel")


def _predictions(path: Path, multilabel: bool) -> Predictions | None:
    lines = _cells(path)
    heads = next(lines, [])
    if not {"name", "label", "predicted", "correct"} <= set(heads):
        return None
    # Where there are many classes, most of a line is probabilities: only what is looked at is kept.
    rows = [line for line in lines if len(line) == len(heads)]
    at = {head: column for column, head in enumerate(heads)}
    texts = {key: [row[at[key]] for row in rows] for key in ("name", "label", "predicted", "correct")}
    correct = np.array([text == "1" for text in texts["correct"]], np.bool_)
    own = [_float(row[at["confidence"]]) for row in rows] if "confidence" in at else [_largest(row, at) for row in rows]
    confidence = np.array(own, np.float64)
    stated, happened = _each_label(heads, rows, at) if multilabel else (confidence, correct)
    known = np.isfinite(stated)
    return Predictions(
        texts["name"], texts["label"], texts["predicted"], correct, confidence, stated[known], happened[known]
    )


def _largest(row: list[str], at: Mapping[str, int]) -> float:
    """Return the largest probability of the labels that were given; NaN without one."""
    given = row[at["probabilities"]].split("|") if "probabilities" in at else []
    return max((_float(text) for text in given if text), default=math.nan)


def _each_label(
    heads: list[str], rows: list[list[str]], at: Mapping[str, int]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the probability of each label of each picture, and whether it was there."""
    columns = [(at[head], head.removeprefix("p_")) for head in heads if head.startswith("p_")]
    stated = np.array([[_float(row[column]) for column, _ in columns] for row in rows], np.float64)
    labels = [set(row[at["label"]].split("|")) for row in rows]
    happened = np.array([[name in given for _, name in columns] for given in labels], np.bool_)
    return stated.reshape(-1), happened.reshape(-1)
