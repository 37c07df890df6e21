"""Several runs side by side on one page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from cvtrain.core import html
from cvtrain.report import charts
from cvtrain.report.charts import Series, few_points, line_chart, percent, points, short
from cvtrain.report.console import human_bytes, short_ms
from cvtrain.report.folder import RunFiles, number
from cvtrain.report.page import TITLES, duration, environment, framed, title_of, winner_of
from cvtrain.report.tables import Cell, sortable

_TONES = 7
"""Colours of lines; further runs take them again, and are told apart by their letters."""


@dataclass(frozen=True)
class Compared:
    """A run among others.

    Attributes:
        run: The run.
        command: What makes it again, for a shell.
        verdict: How it stands to the reference, in words.
        difference: Of its test accuracy to the reference's, and the bounds of its paired 95 % interval, -1..1; None
            where there is none.
    """

    run: RunFiles
    command: str
    verdict: str
    difference: tuple[float, float, float] | None = None


def letter(number: int) -> str:
    """Return A, B, … Z, AA, AB, … for 0, 1, …."""
    rest, last = divmod(number, 26)
    return (letter(rest - 1) if rest else "") + chr(ord("A") + last)


def comparison(compared: Sequence[Compared], how: str) -> str:
    """Return the page.

    Args:
        compared: Two or more runs.
        how: By what the reference was chosen, a sentence.
    """
    runs = [one.run for one in compared]
    sections = {
        "accuracy": _accuracy(compared, how),
        "settings": _settings(runs),
        "curves": _curves(runs),
        "metrics": _metrics(runs),
        "artifacts": _artifacts(runs),
        "reproduce": _again(compared),
    }
    title = f"{len(runs)} runs side by side"
    subjects = ", ".join(dict.fromkeys(title_of(run) for run in runs))
    header = f"<p class=over>cvtrain report</p><h1>{title}</h1><p class=soft>{escape(subjects)}</p>"
    return framed(title, header, {name: body for name, body in sections.items() if body})


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """Return what each run is called: its folder, with the one above where that tells them apart."""
    short_names = [run.folder.name for run in runs]
    if len({run.folder.parent for run in runs}) == 1:
        return short_names
    return [f"{run.folder.parent.name}/{name}" for run, name in zip(runs, short_names, strict=True)]


def _mark(number: int) -> str:
    return f'<span class="chip c{number % _TONES}">{letter(number)}</span>'


def _accuracy(compared: Sequence[Compared], how: str) -> str:
    runs = [one.run for one in compared]
    found = [(run.metrics.get("test/acc", math.nan), run.interval("test/acc")) for run in runs]
    bounds = [value for accuracy, span in found for value in (accuracy, *(span or ())) if math.isfinite(value)]
    if not bounds:
        return html.section("Accuracy", "accuracy", "<p>None of these runs has come to its end.</p>")
    ticks = charts.nice_ticks(min(bounds), min(1.0, max(bounds)))
    scale = (ticks[0], ticks[-1])
    rows = []
    for i, (one, name) in enumerate(zip(compared, _names(runs), strict=True)):
        accuracy, span = found[i]
        low, high = span or (math.nan, math.nan)
        between = f"{100 * low:.2f} to {100 * high:.2f}" if span else "–"
        change = one.difference
        told = f"{points(change[0])} [{points(change[1])}, {points(change[2])}]" if change else "–"
        rows.append([
            Cell(f"{_mark(i)} {escape(name)}", markup=True, kind="name"),
            Cell(charts.interval_bar(accuracy, low, high, scale), accuracy, markup=True, kind="bar dot"),
            Cell(f"{100 * accuracy:.2f} %" if math.isfinite(accuracy) else "–", accuracy),
            Cell(between, low),
            Cell(told, change[0] if change else math.nan),
            Cell(one.verdict),
            Cell(duration(one.run.seconds) if one.run.seconds is not None else "–", one.run.seconds or math.nan),
        ])  # fmt: skip
    heads = (
        "run", f"{percent(scale[0])} to {percent(scale[1])}", runs[0].measure, "95\u00a0% interval",
        "Δ points [95\u00a0%]", "against the reference", "trained for",
    )  # fmt: skip
    note = (
        f"<p class=soft>{escape(how)} The difference is judged picture by picture (paired bootstrap), which tells runs "
        "apart whose own intervals overlap.</p>"
    )
    return html.section("Accuracy", "accuracy", note + sortable(heads, rows, "Test accuracy of each run"))


def _table(runs: Sequence[RunFiles], rows: Sequence[tuple[str, Sequence[str]]], caption: str) -> str:
    heads = "".join(f'<th scope="col">{_mark(i)}</th>' for i in range(len(runs)))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(text)}</td>" for text in texts)}</tr>'
        for name, texts in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="sides">'
        f'<caption class="unseen">{escape(caption)}</caption>'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _settings(runs: Sequence[RunFiles]) -> str:
    # Options of a group that may have several are told key by key.
    chosen_by = [run.manifest.get("choices", {}) for run in runs]
    rows = [
        (name, [str(choices[name]) for choices in chosen_by])
        for name in chosen_by[0]
        if all(name in one for one in chosen_by)
    ]
    rows = [(name, texts) for name, texts in rows if len(set(texts)) > 1]
    chosen = {name for name, _ in rows}
    for key, values in differing([run.config for run in runs]):
        if key not in chosen and key not in ("output_dir", "name", "json", "resume"):
            rows.append((key, [told(value) for value in values]))
    made = [environment(run) for run in runs]
    for key in dict.fromkeys(key for one in made for key in one):
        values = [one.get(key, "–") for one in made]
        if key != "config hash" and len(set(values)) > 1:
            rows.append((key, values))
    body = _table(runs, rows, "What differs") if rows else "<p>Nothing: config, versions and machine are the same.</p>"
    return html.section("What differs", "settings", body)


_MISSING = object()


def differing(configs: Sequence[Mapping[str, Any]], prefix: str = "") -> list[tuple[str, list[Any]]]:
    """Return the keys whose values are not the same in all configs; another option of a group is one difference."""
    found: list[tuple[str, list[Any]]] = []
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [config.get(key, _MISSING) for config in configs]
        if all(value == values[0] for value in values):
            continue
        if all(isinstance(value, dict) for value in values) and len({v.get("_target_") for v in values}) == 1:
            found += differing(values, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", values))
    return found


def told(value: Any) -> str:  # noqa: ANN401 - any plain value
    """Return a value of a config as it is written; of an option its class, of what is missing a dash."""
    if value is _MISSING:
        return "–"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, dict):
        return str(value["_target_"]).rpartition(".")[2] if "_target_" in value else ", ".join(value) or "none"
    return str(value).replace(" ", "") if isinstance(value, list) else str(value)


def _curves(runs: Sequence[RunFiles]) -> str:
    def lines(column: str) -> list[Series]:
        return [Series(letter(i), run.column(column), f"c{i % _TONES}") for i, run in enumerate(runs)]

    gaps = [
        Series(letter(i), [a - b for a, b in zip(run.column("train/acc"), run.column("val/acc"), strict=False)], tone)
        for i, run, tone in ((i, run, f"c{i % _TONES}") for i, run in enumerate(runs))
    ]
    drawn = [
        line_chart("c-loss", "Validation loss", lines("val/loss"), short),
        line_chart("c-acc", f"Validation {runs[0].measure}", lines("val/acc"), percent),
        line_chart("c-gap", "Gap: train minus val accuracy, in points", gaps, few_points, zero=True),
        line_chart("c-lr", "Learning rate", lines("lr"), short),
    ]
    if not any(drawn):
        return ""
    keys = "".join(f"<li>{_mark(i)} {escape(name)}</li>" for i, name in enumerate(_names(runs)))
    return html.section("Curves", "curves", f'<ul class="key">{keys}</ul><div class="charts">{"".join(drawn)}</div>')


def _metrics(runs: Sequence[RunFiles]) -> str:
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.metrics if name.startswith(("test/", "val/"))):
        split, metric = name.split("/", 1)
        rows.append((f"{split} {TITLES.get(metric, metric)}", [_measured(run, name) for run in runs]))
    rows.sort(key=lambda row: not row[0].startswith("test"))
    return html.section("Metrics", "metrics", _table(runs, rows, "Metrics of each run")) if rows else ""


def _measured(run: RunFiles, name: str) -> str:
    value, interval = run.metrics.get(name, math.nan), run.interval(name)
    if not math.isfinite(value):
        return "–"
    return f"{value:.4f}" + (f" [{interval[0]:.4f},\u00a0{interval[1]:.4f}]" if interval else "")


def _artifacts(runs: Sequence[RunFiles]) -> str:
    rows = []
    for i, (run, name) in enumerate(zip(runs, _names(runs), strict=True)):
        winner = winner_of(run)
        for row in [winner] if winner else run.artifacts[:1]:
            rows.append([
                Cell(f"{_mark(i)} {escape(name)}", markup=True, kind="name"),
                Cell(str(row["artifact"])),
                Cell(f"{100 * number(row, 'accuracy'):.2f} %", number(row, "accuracy")),
                Cell(f"{short_ms(number(row, 'latency_ms_p50'))} ms", number(row, "latency_ms_p50")),
                Cell(human_bytes(int(number(row, "bytes"))), number(row, "bytes")),
                Cell(f"{int(number(row, 'params')):,}", number(row, "params")),
            ])  # fmt: skip
    if not rows:
        return ""
    heads = ("run", "artifact", runs[0].measure, "batch 1", "size", "parameters")
    note = "<p class=soft>What each run would deploy. Latencies compare only if they were measured on one machine.</p>"
    return html.section("Artifacts", "artifacts", note + sortable(heads, rows, "The artifact to deploy of each run"))


def _again(compared: Sequence[Compared]) -> str:
    parts = [
        f'<h3>{_mark(i)}</h3><pre tabindex="0"><code>{escape(one.command)}</code></pre>'
        for i, one in enumerate(compared)
        if one.command
    ]
    return html.section("Reproduce them", "reproduce", "".join(parts)) if parts else ""
