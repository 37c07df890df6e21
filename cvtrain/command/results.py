"""Files that say how good a model is: results.csv, per_class.csv, predictions.csv, pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.core.files import write_atomic
from cvtrain.core.metrics import ClassificationMetrics
from cvtrain.engine.parts import Metrics
from cvtrain.evaluation.intervals import wilson
from cvtrain.report import plots


@dataclass(frozen=True)
class Evaluation:
    """One pass over a split.

    Attributes:
        metrics: Of the task, all of the split in them.
        logits: `(N, K)` float32.
        labels: `(N,)` int64, or `(N, K)` of 0 and 1.
        names: N names of pictures.
        class_names: K names.
    """

    metrics: Metrics
    logits: Tensor
    labels: NDArray[np.int64]
    names: Sequence[str]
    class_names: Sequence[str]


def write_results(
    folder: Path, history: Sequence[dict[str, float]], evaluation: Evaluation
) -> tuple[dict[str, tuple[float, float]], dict[str, NDArray[np.uint8]]]:
    """Write tables and pictures of a finished training.

    Args:
        folder: The run folder.
        history: One row an epoch.
        evaluation: The test set's.

    Returns:
        95 % intervals by metric, and the pictures for the logger by name.
    """
    metrics, names = evaluation.metrics, evaluation.class_names
    write_csv(folder / "results.csv", [{"epoch": i + 1, **row} for i, row in enumerate(history)])
    write_csv(folder / "per_class.csv", _class_rows(metrics.by_class(), names))
    rows = _multilabel_rows(evaluation) if evaluation.labels.ndim == 2 else _single_label_rows(evaluation)
    write_csv(folder / "predictions.csv", rows)
    figures = {}
    if isinstance(metrics, ClassificationMetrics):
        for name, normalize in (("confusion_matrix", False), ("confusion_matrix_normalized", True)):
            path = folder / f"{name}.png"
            figures[f"test/{name}"] = plots.confusion(metrics.matrix(), names, path, normalize=normalize)
    if history:
        figures["curves"] = plots.curves(history, folder / "results.png")
    return {"test/acc": wilson(*metrics.right())}, figures


def _class_rows(table: dict[str, NDArray[Any]], class_names: Sequence[str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for i, name in enumerate(class_names):
        low, high = wilson(int(table["hits"][i]), int(table["support"][i]))
        values = {key: column[i].item() for key, column in table.items() if key != "hits"}
        rows.append({"class": name, **values, "recall_low": low, "recall_high": high})
    return rows


def _single_label_rows(evaluation: Evaluation) -> list[dict[str, object]]:
    names = evaluation.class_names
    confidence, predicted = torch.softmax(evaluation.logits, dim=1).max(1)
    return [
        {
            "name": name,
            "label": names[label],
            "predicted": names[guess],
            "confidence": round(sure, 6),
            "correct": int(label == guess),
        }
        for name, label, guess, sure in zip(
            evaluation.names, evaluation.labels.tolist(), predicted.tolist(), confidence.tolist(), strict=True
        )
    ]


def _multilabel_rows(evaluation: Evaluation) -> list[dict[str, object]]:
    """Return the rows; several values of a picture are joined by "|", probabilities in the order of `predicted`."""
    class_names = np.array(evaluation.class_names, dtype=object)
    probabilities = torch.sigmoid(evaluation.logits).numpy()
    rows: list[dict[str, object]] = []
    for i, name in enumerate(evaluation.names):
        label, given = evaluation.labels[i].astype(bool), (evaluation.logits[i] >= 0).numpy()
        rows.append(
            {
                "name": name,
                "label": "|".join(class_names[label]),
                "predicted": "|".join(class_names[given]),
                "probabilities": "|".join(f"{value:.6f}" for value in probabilities[i][given]),
                "correct": int((label == given).all()),
            }
        )
    return rows


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write dictionaries as CSV, durably, an empty cell where one lacks a key; nothing for no rows."""
    if not rows:
        return
    text = io.StringIO()
    writer = csv.DictWriter(
        text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))
