"""Files that say how good a model is: results.csv, and of a split tables and pictures of its answers."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.core.files import write_atomic
from cvtrain.core.metrics import ClassificationMetrics
from cvtrain.engine.parts import Metrics
from cvtrain.evaluation.calibration import to_probabilities
from cvtrain.evaluation.intervals import wilson
from cvtrain.evaluation.scores import Scores, reliability, score
from cvtrain.inspection.mistakes import worst_first

COLUMNS_OF_CLASSES = 100
"""Up to how many classes predictions.csv has a column for each."""
ERRORS, ERRORS_A_ROW = 32, 8
"""Pictures of the contact sheet."""


@dataclass(frozen=True)
class Evaluation:
    """One pass over a split.

    Attributes:
        metrics: Of the task, all of the split in them.
        logits: `(N, K)` float32 on the CPU.
        labels: `(N,)` int64, or `(N, K)` of 0 and 1.
        names: N names of pictures.
        class_names: K names.
        temperature: What logits are divided by before they become probabilities.
        pictures: Reads pictures by position, uint8 `(B, C, H, W)`; None: no contact sheet of the worst errors.
        split: What they are, for titles.
    """

    metrics: Metrics
    logits: Tensor
    labels: NDArray[np.int64]
    names: Sequence[str]
    class_names: Sequence[str]
    temperature: float = 1.0
    pictures: Callable[[NDArray[np.int64]], Tensor] | None = None
    split: str = "test"

    @property
    def multilabel(self) -> bool:
        """Return whether a picture may have several labels."""
        return self.labels.ndim == 2

    @cached_property
    def probabilities(self) -> NDArray[np.float32]:
        """Return the calibrated ones, `(N, K)`."""
        found: NDArray[np.float32] = to_probabilities(self.logits, self.temperature, self.multilabel).numpy()
        return found

    @cached_property
    def given(self) -> NDArray[np.int64]:
        """Return the answers in the shape of `labels`."""
        found: NDArray[np.int64] = ((self.logits >= 0).long() if self.multilabel else self.logits.argmax(1)).numpy()
        return found

    @cached_property
    def scores(self) -> Scores:
        """Return all metrics with their intervals."""
        return score(self.labels, self.logits, self.temperature)

    def named(self, answers: NDArray[np.int64]) -> list[str]:
        """Return labels or answers in words; several of a picture are joined by "|"."""
        if not self.multilabel:
            return [self.class_names[k] for k in answers.tolist()]
        return ["|".join(self.class_names[k] for k in np.flatnonzero(row).tolist()) for row in answers]


def write_results(
    folder: Path, history: Sequence[dict[str, float]], evaluation: Evaluation, draw: bool
) -> tuple[dict[str, tuple[float, float]], dict[str, NDArray[np.uint8]]]:
    """Write tables and pictures of a finished training.

    Args:
        folder: The run folder.
        history: One row an epoch.
        evaluation: The test set's.
        draw: Whether pictures are wanted.

    Returns:
        95 % intervals by metric, and the pictures for the logger by name.
    """
    write_csv(folder / "results.csv", [{"epoch": i + 1, **row} for i, row in enumerate(history)])
    figures = {f"test/{name}": picture for name, picture in write_evaluation(folder, evaluation, draw).items()}
    if history and draw:
        from cvtrain.report import plots  # matplotlib: a run without pictures need not wait for it

        figures["curves"] = plots.curves(history, folder / "results.png")
    return {f"test/{name}": bounds for name, bounds in evaluation.scores.intervals.items()}, figures


def write_evaluation(folder: Path, evaluation: Evaluation, draw: bool = True) -> dict[str, NDArray[np.uint8]]:
    """Write what a model says of a split: tables, matrices, reliability diagram, worst errors.

    Several labels have no matrix of classes: any number of them may be there at once.

    Args:
        folder: Exists.
        evaluation: Of one picture or more.
        draw: Whether pictures are wanted beside the tables.

    Returns:
        Pictures `(H, W, 3)` by name.
    """
    names, metrics = evaluation.class_names, evaluation.metrics
    write_csv(folder / "per_class.csv", _class_rows(metrics.by_class(), names))
    write_predictions(folder / "predictions.csv", evaluation)
    if isinstance(metrics, ClassificationMetrics):
        rows = ([name, *row] for name, row in zip(names, metrics.matrix().tolist(), strict=True))
        _write_rows(folder / "confusion_matrix.csv", [["true \\ predicted", *names], *rows])
    return _draw_evaluation(folder, evaluation) if draw else {}


def _draw_evaluation(folder: Path, evaluation: Evaluation) -> dict[str, NDArray[np.uint8]]:
    """Draw matrices, reliability diagram and worst errors."""
    from cvtrain.report import plots

    names, metrics, figures = evaluation.class_names, evaluation.metrics, {}
    if isinstance(metrics, ClassificationMetrics):
        matrix, what = metrics.matrix(), f"{evaluation.split} pictures"
        for name, normalize in (("confusion_matrix", False), ("confusion_matrix_normalized", True)):
            figures[name] = plots.confusion(matrix, names, folder / f"{name}.png", normalize, what)
    stages = [("ece_uncalibrated", "before calibration", 1.0)] if evaluation.temperature != 1 else []
    title = f"temperature {evaluation.temperature:.3g}" if stages else "as given"
    stages.append(("ece", title, evaluation.temperature))
    panels = []
    for name, title, scale in stages:
        probabilities = to_probabilities(evaluation.logits, scale, evaluation.multilabel)
        panels.append((title, reliability(probabilities, evaluation.labels), evaluation.scores.values[name]))
    figures["reliability"] = plots.reliability(panels, folder / "reliability.png")
    _write_errors(folder / "errors.png", evaluation)
    return figures


def _class_rows(table: dict[str, NDArray[Any]], class_names: Sequence[str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for i, name in enumerate(class_names):
        low, high = wilson(int(table["hits"][i]), int(table["support"][i]))
        values = {key: column[i].item() for key, column in table.items() if key != "hits"}
        rows.append({"class": name, **values, "recall_low": low, "recall_high": high})
    return rows


def write_predictions(path: Path, evaluation: Evaluation) -> None:
    """Write what a model says of each picture as CSV.

    Its name, true class, answer, how sure the answer is, and whether it is right; of several labels the names are
    joined by "|", and so are the probabilities of those that were given. With up to 100 classes one column `p_CLASS`
    each. Probabilities are calibrated, in the nine digits that bring a float32 back as it was.
    """
    names, probabilities = evaluation.class_names, evaluation.probabilities
    right = (evaluation.given == evaluation.labels).reshape(len(evaluation.labels), -1).all(1)
    if evaluation.multilabel:
        given = evaluation.given.astype(bool)
        sure = ["|".join(f"{p:.9g}" for p in row[own]) for row, own in zip(probabilities, given, strict=True)]
    else:
        sure = [f"{p:.9g}" for p in probabilities.max(1)]
    head = ["name", "label", "predicted", "probabilities" if evaluation.multilabel else "confidence", "correct"]
    rows: Sequence[Sequence[object]] = list(
        zip(
            *(evaluation.names, evaluation.named(evaluation.labels), evaluation.named(evaluation.given), sure),
            right.astype(int).tolist(),
            strict=True,
        )
    )
    if len(names) <= COLUMNS_OF_CLASSES:
        head += [f"p_{name}" for name in names]
        shares = ([f"{p:.9g}" for p in row] for row in probabilities.tolist())
        rows = [[*row, *share] for row, share in zip(rows, shares, strict=True)]
    _write_rows(path, [head, *rows])


def _write_errors(path: Path, evaluation: Evaluation) -> None:
    """Draw the most confident wrong answers; an earlier sheet goes where there is none."""
    from cvtrain.report import grids

    wrong = (evaluation.given != evaluation.labels).reshape(len(evaluation.labels), -1).any(1)
    if evaluation.pictures is None or not wrong.any():
        path.unlink(missing_ok=True)
        return
    sure = _certainty(evaluation)
    chosen = worst_first(~wrong, sure)[: min(ERRORS, int(wrong.sum()))]
    pictures = evaluation.pictures(chosen).permute(0, 2, 3, 1).numpy()
    channels = 3 if pictures.shape[-1] >= 3 else 1
    labels, given = evaluation.named(evaluation.labels[chosen]), evaluation.named(evaluation.given[chosen])
    captions = [
        f"{grids.shortened(said or 'none', 16)} {value:.2f}\ntrue: {grids.shortened(true or 'none', 15)}"
        for true, said, value in zip(labels, given, sure[chosen].tolist(), strict=True)
    ]
    places = range(0, len(chosen), ERRORS_A_ROW)
    grids.grid(
        path,
        f"Worst errors: {len(chosen)} of {int(wrong.sum())} wrong answers to {len(wrong)} {evaluation.split} pictures",
        [list(pictures[i : i + ERRORS_A_ROW, ..., :channels]) for i in places],
        captions=[captions[i : i + ERRORS_A_ROW] for i in places],
    )


def _certainty(evaluation: Evaluation) -> NDArray[np.float32]:
    """Return `(N,)`: the probability of the answer; of several labels that of the surest wrong one of a picture."""
    probabilities = evaluation.probabilities
    if not evaluation.multilabel:
        found: NDArray[np.float32] = probabilities.max(1)
        return found
    decided = np.where(evaluation.given == 1, probabilities, 1 - probabilities)
    surest: NDArray[np.float32] = np.where(evaluation.given != evaluation.labels, decided, 0).max(1)
    return surest


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write dictionaries as CSV, durably, an empty cell where one lacks a key; nothing for no rows."""
    if rows:
        names = list(dict.fromkeys(key for row in rows for key in row))
        _write_rows(path, [names, *([row.get(name, "") for name in names] for row in rows)])


def _write_rows(path: Path, rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))
