"""Drawings inside a page: SVG that takes its colours from the page's style and says in words what it shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

Form = Callable[[float], str]
"""Writes a value as text."""

_WIDTH, _HEIGHT = 380, 224
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 42, 16, 30
_LABEL, _APART = 13, 30
"""Least height between two names at the ends of lines, and from which distance sideways it does not matter."""
_POINTS = 400
"""Points that a line has at most: a screen shows no more."""
_TOUCHED = 60
"""Epochs up to which each point tells its value under the pointer."""


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: At its end.
        values: One an epoch, from the first; NaN where there is none.
        tone: Class of its colour in the style.
    """

    name: str
    values: Sequence[float]
    tone: str


def percent(value: float) -> str:
    """Write a share as per cent, on one line."""
    return f"{100 * value:.4g}\u00a0%"


def points(value: float) -> str:
    """Write a difference of shares in points."""
    return f"{100 * value:+.2f}"


def few_points(value: float) -> str:
    """Write a difference of shares in points, as short as a round one can be."""
    return f"{100 * value:+.3g}" if value else "0"


def short(value: float) -> str:
    """Write a number with three digits."""
    return f"{value:.3g}"


def line_chart(
    anchor: str, title: str, series: Sequence[Series], form: Form, marked: int | None = None, zero: bool = False
) -> str:
    """Return lines against the epoch; empty where there is nothing to draw.

    Args:
        anchor: Unique on the page.
        title: Above it.
        series: Lines; those without a value are left out.
        form: Of the values.
        marked: Epoch with a vertical line, from 1; None: none.
        zero: Whether 0 is in it, with a line of its own.
    """
    shown = [one for one in series if any(math.isfinite(value) for value in one.values)]
    if not shown:
        return ""
    finite = [value for one in shown for value in one.values if math.isfinite(value)] + [0.0] * zero
    ticks = nice_ticks(min(finite), max(finite))
    low, high = min(ticks[0], *finite), max(ticks[-1], *finite)
    epochs = max(len(one.values) for one in shown)

    def across(epoch: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((epoch - 1) / (epochs - 1) if epochs > 1 else 0.5)

    def up(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    parts = [_rules(ticks, up, form, zero), _epochs(epochs, across)]
    if marked is not None and epochs > 1:
        x = across(marked)
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
            f'<text x="{x:.1f}" y="{_TOP - 5}" text-anchor="middle">best</text>'
        )
    parts += [_line(one, across, up, form) for one in shown]
    parts.append(_names(shown, across, up))
    told = f"{title} against the epoch. " + " ".join(_told(one, form) for one in shown)
    drawing = _svg(anchor, title, told, (_WIDTH, _HEIGHT), "".join(parts))
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{drawing}</figure>'


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return two or more round values, evenly spaced, that begin at or below `low` and end at or above `high`."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    rough = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _rules(ticks: Sequence[float], up: Form | Callable[[float], float], form: Form, zero: bool) -> str:
    parts = []
    for tick in ticks:
        y = up(tick)
        kind = ' class="zero"' if zero and tick == 0 else ""
        parts.append(
            f'<line{kind} x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{float(y) + 3.5:.1f}" text-anchor="end">{escape(form(tick))}</text>'
        )
    return f'<g class="rules">{"".join(parts)}</g>'


def _epochs(epochs: int, across: Callable[[float], float]) -> str:
    step = max(1, math.ceil(nice_ticks(0, epochs, 5)[1]))
    ticks = [1, *(epoch for epoch in range(step, epochs + 1, step) if epoch >= 1 + step / 2)]
    texts = "".join(
        f'<text x="{across(epoch):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{epoch}</text>'
        for epoch in ticks
    )
    last = f'<text x="{_LEFT - 10}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="end">epoch</text>'
    return f'<g class="rules">{texts}{last}</g>'


def _line(one: Series, across: Callable[[float], float], up: Callable[[float], float], form: Form) -> str:
    stride = -(-len(one.values) // _POINTS)
    kept = [(i + 1, v) for i, v in enumerate(one.values) if i % stride == 0 or i == len(one.values) - 1]
    path, drawing = [], False
    for epoch, value in kept:
        if math.isfinite(value):
            path.append(f"{'L' if drawing else 'M'}{across(epoch):.1f} {up(value):.1f}")
        drawing = math.isfinite(value)
    dots = "" if len(path) > _TOUCHED else "".join(
        f'<circle cx="{across(epoch):.1f}" cy="{up(value):.1f}" r="5">'
        f"<title>{escape(one.name)}, epoch {epoch}: {escape(form(value))}</title></circle>"
        for epoch, value in kept
        if math.isfinite(value)
    )  # fmt: skip
    lone = " lone" if len(path) == 1 else ""
    return f'<g class="line {one.tone}{lone}"><path d="{" ".join(path)}"/>{dots}</g>'


def _names(series: Sequence[Series], across: Callable[[float], float], up: Callable[[float], float]) -> str:
    """Name the lines at their ends, none on another."""
    ends = []
    for one in series:
        epoch, value = [(i + 1, v) for i, v in enumerate(one.values) if math.isfinite(v)][-1]
        ends.append((up(value), across(epoch), one))
    placed: list[tuple[float, float]] = []
    for y, x, _ in sorted(ends, key=lambda end: end[0]):
        height = max(y, _TOP + 3.0)
        for other in sorted(other for at, other in placed if abs(at - x) < _APART):
            if abs(other - height) < _LABEL:
                height = other + _LABEL
        placed.append((x, height))
    texts = []
    for (x, height), (_, _, one) in zip(placed, sorted(ends, key=lambda end: end[0]), strict=True):
        lowest = max(other for at, other in placed if abs(at - x) < _APART)
        up_by = max(0.0, lowest - (_HEIGHT - _BOTTOM))
        texts.append(
            f'<text class="{one.tone}" x="{x + 6:.1f}" y="{height - up_by + 3.5:.1f}">{escape(one.name)}</text>'
        )
    return f'<g class="names">{"".join(texts)}</g>'


def _told(one: Series, form: Form) -> str:
    found = [(value, i + 1) for i, value in enumerate(one.values) if math.isfinite(value)]
    lowest, highest = min(found), max(found)
    return (
        f"{one.name}: {form(found[0][0])} at epoch {found[0][1]}, {form(found[-1][0])} at epoch {found[-1][1]}; "
        f"lowest {form(lowest[0])} at epoch {lowest[1]}, highest {form(highest[0])} at epoch {highest[1]}."
    )


_GRID = 330
_CELL = 34
_NAMED = 40
"""Classes up to which the matrix names them."""
_COUNTED = 15
"""Classes up to which it shows counts."""


def confusion(anchor: str, names: Sequence[str], matrix: NDArray[np.int64]) -> str:
    """Return a confusion matrix as a drawing: right answers in one colour, wrong in another, deeper for more of a row.

    Args:
        anchor: Unique on the page.
        names: K class names.
        matrix: `(K, K)` counts, rows true classes.
    """
    k = len(names)
    cell = min(_CELL, _GRID / k)
    font = min(11.0, 0.9 * cell)
    shown = [name if len(name) <= 16 else f"{name[:15]}…" for name in names] if k <= _NAMED else []
    margin = 20 + 0.62 * font * max((len(name) for name in shown), default=0)
    turned = any(0.62 * font * len(name) > cell for name in shown)
    top = margin if turned else 20 + font
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    cells = []
    for i, j in zip(*(index.tolist() for index in np.nonzero(matrix)), strict=True):
        share, count = float(shares[i, j]), int(matrix[i, j])
        x, y = margin + j * cell, top + i * cell
        # A rare error is as faint as it is rare, but must be seen.
        depth = 0.12 + 0.88 * (share if i == j else math.sqrt(share))
        told = f"{names[i]}, predicted {names[j]}: {count} ({100 * share:.3g} %)"
        cells.append(
            f'<rect class="{"right" if i == j else "wrong"}" x="{x:.1f}" y="{y:.1f}" width="{cell:.2f}" '
            f'height="{cell:.2f}" fill-opacity="{depth:.2f}"><title>{escape(told)}</title></rect>'
        )
        if k <= _COUNTED:
            cells.append(
                f'<text class="count{" on" if depth > 0.6 else ""}" x="{x + cell / 2:.1f}" '
                f'y="{y + cell / 2 + 4:.1f}" text-anchor="middle">{count}</text>'
            )
    side = k * cell
    frame = f'<rect class="frame" x="{margin:.1f}" y="{top:.1f}" width="{side:.1f}" height="{side:.1f}"/>'
    heights = [top + (i + 0.5) * cell + 0.35 * font for i in range(k)]
    rows = "".join(
        f'<text x="{margin - 5:.1f}" y="{y:.1f}" text-anchor="end">{escape(name)}</text>'
        for name, y in zip(shown, heights, strict=False)
    )
    columns = "".join(_column(name, margin + (j + 0.5) * cell, top - 5, font, turned) for j, name in enumerate(shown))
    words = (
        f'<g class="axes"><text x="{margin + side / 2:.1f}" y="11" text-anchor="middle">predicted</text>'
        f'<text transform="translate(11 {top + side / 2:.1f}) rotate(-90)" text-anchor="middle">true</text></g>'
    )
    right, total = int(np.trace(matrix)), int(matrix.sum())
    told = f"{k} classes, {total} pictures, {right} on the diagonal. The table beside it lists the confusions."
    body = f'{words}<g style="font-size:{font:.1f}px">{rows}{columns}</g>{"".join(cells)}{frame}'
    return _svg(anchor, "Confusion matrix", told, (margin + side + 2, top + side + 2), body, "matrix")


def _column(name: str, x: float, y: float, font: float, turned: bool) -> str:
    if not turned:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(name)}</text>'
    return f'<text transform="translate({x + 0.35 * font:.1f} {y:.1f}) rotate(-90)">{escape(name)}</text>'


@dataclass(frozen=True)
class Bin:
    """Answers of about the same confidence.

    Attributes:
        count: How many.
        confidence: Their mean probability, 0..1.
        accuracy: Share of them that came true, 0..1.
        low: Lower bound of its 95 % interval.
        high: Upper bound of it.
    """

    count: int
    confidence: float
    accuracy: float
    low: float
    high: float


_SQUARE, _BARS = 260, 44


def reliability(anchor: str, bins: Sequence[Bin]) -> str:
    """Return a reliability diagram: how often answers are right against how sure they are, and how many there are.

    Args:
        anchor: Unique on the page.
        bins: One or more, none of them empty.
    """
    left, top = 58, 8
    most = max(one.count for one in bins)

    def across(value: float) -> float:
        return left + _SQUARE * value

    def up(value: float) -> float:
        return top + _SQUARE * (1 - value)

    rules = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        rules.append(f'<line x1="{left}" x2="{left + _SQUARE}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        rules.append(f'<text x="{left - 6}" y="{up(tick) + 3.5:.1f}" text-anchor="end">{percent(tick)}</text>')
        base = top + _SQUARE + _BARS + 22
        rules.append(f'<text x="{across(tick):.1f}" y="{base}" text-anchor="middle">{percent(tick)}</text>')
    marks = []
    for one in bins:
        x, told = (
            across(one.confidence),
            f"{one.count} answers, {percent(one.confidence)} sure, {percent(one.accuracy)} right",
        )
        height = max(1.0, (_BARS - 6) * one.count / most)
        marks.append(
            f'<g class="bin"><title>{escape(told)}</title>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up(one.low):.1f}" y2="{up(one.high):.1f}"/>'
            f'<circle cx="{x:.1f}" cy="{up(one.accuracy):.1f}" r="4"/>'
            f'<rect x="{x - 4:.1f}" y="{top + _SQUARE + 6 + _BARS - height:.1f}" width="8" height="{height:.1f}"/></g>'
        )
    ideal = f'<line class="mark" x1="{across(0)}" y1="{up(0)}" x2="{across(1)}" y2="{up(1)}"/>'
    bottom = top + _SQUARE + _BARS + 38
    words = (
        f'<g class="axes"><text x="{left + _SQUARE / 2}" y="{bottom}" text-anchor="middle">how sure; bars: how many'
        f'</text><text transform="translate(10 {top + _SQUARE / 2}) rotate(-90)" text-anchor="middle">how often right'
        "</text></g>"
    )
    told = " ".join(
        f"{one.count} answers that are {percent(one.confidence)} sure are right in {percent(one.accuracy)}."
        for one in bins
    )
    body = f'<g class="rules">{"".join(rules)}</g>{ideal}{"".join(marks)}{words}'
    return _svg(anchor, "Reliability diagram", told, (left + _SQUARE + 16, bottom + 4), body, "square")


def _svg(anchor: str, title: str, told: str, size: tuple[float, float], body: str, kind: str = "") -> str:
    return (
        f'<svg class="{kind or "lines"}" viewBox="0 0 {size[0]:.0f} {size[1]:.0f}" '
        f'style="max-width:{1.5 * size[0]:.0f}px" role="img" aria-labelledby="{anchor}-t {anchor}-d">'
        f'<title id="{anchor}-t">{escape(title)}</title><desc id="{anchor}-d">{escape(told)}</desc>{body}</svg>'
    )


def interval_bar(value: float, low: float, high: float, scale: tuple[float, float] = (0.0, 1.0)) -> str:
    """Return a bar with its interval as a small drawing for a table's cell; what it shows stands beside it in numbers.

    Args:
        value: Its length.
        low: Lower bound; NaN where there is no interval.
        high: Upper bound.
        scale: Values at the left and right end.
    """
    at, left, right = (100 * (v - scale[0]) / (scale[1] - scale[0]) for v in (value, low, high))
    if not math.isfinite(at):
        return ""
    whisker = f'<b style="left:{left:.2f}%;width:{right - left:.2f}%"></b>' if math.isfinite(left + right) else ""
    return f'<span class="ci" aria-hidden="true"><i style="width:{at:.2f}%"></i>{whisker}</span>'
