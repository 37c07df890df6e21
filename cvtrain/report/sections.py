"""Sections of a run's page on its answers: classes, worst errors, calibration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from cvtrain.core import html
from cvtrain.report import charts
from cvtrain.report.charts import Bin, percent, points, short
from cvtrain.report.folder import Predictions, RunFiles, number
from cvtrain.report.tables import Cell, sortable

_PAIRS_SHOWN = 12
_ERRORS_LISTED = 20
_MATRIX_CLASSES = 200
"""Classes up to which the confusion matrix is drawn."""


@dataclass(frozen=True)
class Setting:
    """A value of the config that is not the default one; texts."""

    key: str
    value: str
    default: str


@dataclass(frozen=True)
class ErrorPicture:
    """A wrong answer, to be looked at.

    Attributes:
        row: In predictions.csv.
        picture: As the model gets it.
        overlay: The same with what speaks for the answer in colour; None where that could not be found.
        asked: Class whose evidence the overlay shows.
    """

    row: int
    picture: Image.Image
    overlay: Image.Image | None
    asked: str


@dataclass(frozen=True)
class Findings:
    """What the page tells besides the files of the run folder.

    Attributes:
        settings: What differs from the defaults; None where these could not be told.
        command: What makes the run again, for a shell; empty where it is not known.
        bins: Of the reliability diagram.
        ece: Calibration error of the same probabilities, 0..1.
        errors: The worst errors with their pictures.
        without: Why there are no pictures, a sentence; empty where there are.
    """

    settings: Sequence[Setting] | None = None
    command: str = ""
    bins: Sequence[Bin] = ()
    ece: float = math.nan
    errors: Sequence[ErrorPicture] = ()
    without: str = ""


def classes(run: RunFiles) -> str:
    """Return which classes are taken for which, and how well each is recognised; empty where nothing is known."""
    parts = []
    if run.predictions is not None and not run.multilabel and 0 < len(run.class_names) <= _MATRIX_CLASSES:
        parts.append(_confusions(run.predictions, run.class_names))
    elif not run.multilabel:
        parts.append(saved(run, "confusion_matrix_normalized.png", "Confusion matrix, share of each true class"))
    parts.append(_class_table(run))
    return html.section("Classes", "classes", "".join(parts)) if any(parts) else ""


def _confusions(given: Predictions, names: Sequence[str]) -> str:
    at = {name: i for i, name in enumerate(names)}
    matrix = np.zeros((len(names), len(names)), np.int64)
    for label, answer in zip(given.labels, given.predicted, strict=True):
        if label in at and answer in at:
            matrix[at[label], at[answer]] += 1
    pairs = Counter((a, b) for a, b in zip(given.labels, given.predicted, strict=True) if a != b)
    support = Counter(given.labels)
    rows = []
    for (true, answer), count in pairs.most_common(_PAIRS_SHOWN):
        share = count / support[true]
        rows.append([Cell(true), Cell(answer), Cell(str(count), count), Cell(f"{100 * share:.1f} %", share)])
    listed = sortable(("true", "predicted", "times", "of its class"), rows, "Most frequent confusions")
    side = f"<h3>Most frequent confusions</h3>{listed}" if rows else "<p>No picture was taken for another class.</p>"
    note = "<p class=soft>Blue is right, orange wrong, both deeper for more of a row.</p>"
    drawing = charts.confusion("matrix", names, matrix)
    return f'<div class="pair"><div>{drawing}{note}</div><div>{side}</div></div>'


def _class_table(run: RunFiles) -> str:
    if not run.classes:
        return ""
    columns = [name for name in ("precision", "f1", "average_precision") if name in run.classes[0]]
    rows = []
    for row in run.classes:
        recall, low, high = (number(row, key) for key in ("recall", "recall_low", "recall_high"))
        rows.append([
            Cell(row.get("class", "")),
            Cell(charts.interval_bar(recall, low, high), recall, markup=True, kind="bar"),
            Cell(f"{100 * recall:.1f} %", recall, hint=f"95 % interval {percent(low)} to {percent(high)}"),
            *(Cell(f"{100 * number(row, name):.1f} %", number(row, name)) for name in columns),
            Cell(row.get("support", ""), number(row, "support")),
        ])  # fmt: skip
    titles = {"f1": "F1", "average_precision": "AP"}
    heads = ("class", "recall, 95\u00a0% interval", "recall", *(titles.get(name, name) for name in columns), "pictures")
    return f"<h3>Each class</h3>{sortable(heads, rows, 'Recall, precision and F1 of each class', 'tall')}"


def errors(run: RunFiles, found: Findings) -> str:
    """Return the worst errors, with their pictures where there are some; empty without predictions.csv."""
    given = run.predictions
    if given is None:
        return ""
    wrong, total = int((~given.correct).sum()), len(given.correct)
    if not wrong:
        return html.section("Worst errors", "errors", f"<p>All {total} answers are right.</p>")
    title = f"Worst errors: {wrong} of {total} are wrong"
    if found.errors:
        seen = any(one.overlay is not None for one in found.errors)
        note = "The most confident wrong answers." + seen * (
            " At the right of each picture Grad-CAM: what spoke most for the answer is brightest."
        )
        figures = "".join(_error(given, one) for one in found.errors)
        return html.section(title, "errors", f'<p class=soft>{note}</p><div class="errors">{figures}</div>')
    rows = [
        [
            *(Cell(texts[i] or "none") for texts in (given.names, given.labels, given.predicted)),
            _sure(given.confidence[i]),
        ]
        for i in given.worst(_ERRORS_LISTED)
    ]
    listed = sortable(("picture", "true", "predicted", "confidence"), rows, "The most confident wrong answers")
    return html.section(title, "errors", f"<p class=soft>{escape(found.without)}</p>" * bool(found.without) + listed)


def _sure(confidence: float) -> Cell:
    return Cell(f"{100 * confidence:.1f} %" if math.isfinite(confidence) else "–", float(confidence))


def _error(given: Predictions, one: ErrorPicture) -> str:
    true, said = given.labels[one.row] or "none", given.predicted[one.row] or "none"
    sure = given.confidence[one.row]
    pictures = html.picture(one.picture, f"A picture of {true}, predicted {said}")
    if one.overlay is not None:
        pictures += html.picture(one.overlay, f"The same picture: what speaks for {one.asked} is bright")
    told = f" {100 * sure:.1f} %" if math.isfinite(sure) else ""
    return (
        f'<figure><div class="two">{pictures}</div><figcaption><b>{escape(true)}</b>, predicted '
        f"<b>{escape(said)}</b>{told}<br>{escape(given.names[one.row])}</figcaption></figure>"
    )


def saved(run: RunFiles, name: str, text: str) -> str:
    """Return a PNG of the run folder, `text` saying what it shows; empty where it is missing or damaged."""
    try:
        with Image.open(run.folder / name) as image:
            size = f'width="{image.width}" height="{image.height}"'
            image.verify()
        data = (run.folder / name).read_bytes()
    except (OSError, SyntaxError, ValueError):
        return ""
    return f'<div class="wide"><img class="paper" src="{html.embedded(data, "png")}" {size} alt="{escape(text)}"></div>'


def calibration(run: RunFiles, found: Findings) -> str:
    """Return whether probabilities mean what they say; empty without predictions.csv."""
    given = run.predictions
    if given is None:
        return ""
    if not found.bins:
        return html.section("Calibration", "calibration", "<p>predictions.csv has no probabilities to judge.</p>")
    sure, right = float(given.stated.mean()), float(given.happened.mean())
    tone = "too sure" if sure > right else "not sure enough"
    facts = [
        f"On average the probabilities are {percent(sure)}, and {percent(right)} come true: "
        f"{points(sure - right)} points, {tone}.",
        f"The calibration error (ECE, 15 bins) of predictions.csv is {100 * found.ece:.2f} points.",
    ]
    if run.temperature is not None:
        effect = "sharpens" if run.temperature < 1 else "softens"
        facts.append(
            f"The temperature, fitted on the validation set, is {short(run.temperature)}"
            + (f": it {effect} what the model says." if run.temperature != 1 else ".")
        )
    facts.append("Points on the dotted line are as often right as they say; the lines through them are 95 % intervals.")
    told = "".join(f"<p>{escape(fact)}</p>" for fact in facts)
    drawing = charts.reliability("reliability", found.bins)
    return html.section("Calibration", "calibration", f'<div class="pair"><div>{drawing}</div><div>{told}</div></div>')
