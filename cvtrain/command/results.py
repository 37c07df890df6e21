"""Files that say how good a model is: results.csv, per_class.csv, predictions.csv, pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.core.files import write_atomic
from cvtrain.core.metrics import per_class
from cvtrain.evaluation.intervals import wilson
from cvtrain.report import plots


@dataclass(frozen=True)
class Evaluation:
    """One pass over a split.

    Attributes:
        matrix: Confusion matrix `(K, K)`, rows true classes.
        logits: `(N, K)` float32.
        labels: `(N,)` int64.
        names: N names of pictures.
        class_names: K names.
    """

    matrix: NDArray[np.int64]
    logits: Tensor
    labels: NDArray[np.int64]
    names: Sequence[str]
    class_names: Sequence[str]


def write_results(
    folder: Path, history: Sequence[dict[str, float]], results: dict[str, float], evaluation: Evaluation
) -> tuple[dict[str, tuple[float, float]], dict[str, NDArray[np.uint8]]]:
    """Write tables and pictures of a finished training.

    Args:
        folder: The run folder.
        history: One row an epoch.
        results: Final metrics.
        evaluation: The test set's.

    Returns:
        95 % intervals by metric, and the pictures for the logger by name.
    """
    matrix = evaluation.matrix
    write_csv(folder / "results.csv", [{"epoch": i + 1, **row} for i, row in enumerate(history)])
    table = per_class(matrix)
    write_csv(
        folder / "per_class.csv",
        [
            {
                "class": name,
                "support": int(matrix[i].sum()),
                "precision": table["precision"][i],
                "recall": table["recall"][i],
                "f1": table["f1"][i],
                **dict(
                    zip(
                        ("recall_low", "recall_high"),
                        wilson(int(matrix[i, i]), max(1, int(matrix[i].sum()))),
                        strict=True,
                    )
                ),
            }
            for i, name in enumerate(evaluation.class_names)
        ],
    )
    probabilities = torch.softmax(evaluation.logits, dim=1)
    confidence, predicted = probabilities.max(1)
    names = evaluation.class_names
    write_csv(
        folder / "predictions.csv",
        [
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
        ],
    )
    figures = {
        "test/confusion_matrix": plots.confusion(matrix, names, folder / "confusion_matrix.png", normalize=False),
        "test/confusion_matrix_normalized": plots.confusion(
            matrix, names, folder / "confusion_matrix_normalized.png", normalize=True
        ),
    }
    if history:
        figures["curves"] = plots.curves(history, folder / "results.png")
    return {"test/acc": wilson(int(np.trace(matrix)), int(matrix.sum()))}, figures


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write dictionaries with equal keys as CSV, durably; nothing for no rows."""
    if not rows:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))
