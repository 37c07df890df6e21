"""Metrics of several models side by side, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table

SHOWN = ("acc", "map", "f1", "auroc", "ece", "loss")
"""Metrics that the table has room for, all but the loss in percent."""


@dataclass(frozen=True)
class ScoreRow:
    """What one model comes to.

    Attributes:
        name: Of the model.
        values: By metric.
        intervals: 95 %, by metric.
        seconds: What its answers took.
        difference: Of its accuracy to the first row's, and the bounds of the paired 95 % interval; None: unknown.
    """

    name: str
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    seconds: float
    difference: tuple[float, float, float] | None = None


def scores_table(title: str, rows: Sequence[ScoreRow]) -> Table:
    """Return one row a model: metrics above their 95 % intervals, and the accuracy against the first row's.

    Args:
        title: Above all.
        rows: The one that the others are compared with first.
    """
    table = Table(
        title=escape(title), title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD,
        pad_edge=False, show_edge=False, padding=(0, 1), collapse_padding=True,
    )  # fmt: skip
    table.add_column("artifact", overflow="fold")
    names = [name for name in SHOWN if name in rows[0].values]
    heads = (name if name == "loss" else f"{name}, %" for name in names)
    for head in (*heads, "Δ acc, points", "seconds"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        change = "–"
        if row.difference is not None:
            value, low, high = (100 * number for number in row.difference)
            change = f"{value:+.2f}\n[{low:+.2f}, {high:+.2f}]"
        cells = (_cell(name, row.values[name], row.intervals.get(name, ())) for name in names)
        table.add_row(escape(row.name), *(escape(cell) for cell in (*cells, change)), f"{row.seconds:.2f}")
    return table


def _cell(name: str, value: float, interval: Sequence[float]) -> str:
    shown, *bounds = (f"{n:.3f}" if name == "loss" else f"{100 * n:.2f}" for n in (value, *interval))
    return f"{shown}\n[{', '.join(bounds)}]" if bounds else shown
