"""What the artifacts table comes to: which file to deploy, where compression did not pay, whether the gates are passed.

Rows are those of artifacts.csv as dictionaries, the float reference first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cvtrain.core.runtimes import ONNXRUNTIME, TORCH
from cvtrain.errors import GateError

TIE = 0.05
"""Latencies that differ by less than this share count as equal: it is what repeated measurements differ by."""
GAIN = 1.2
"""Times the speed of PyTorch below which a float ONNX file is said not to pay."""
QUANTIZED = ("int8", "int8d", "qat")
"""Last parts of the names of INT8 artifacts."""

Row = Mapping[str, Any]
Limits = Mapping[str, float | None]
"""Of `budget` or `gate`, by key; None: no limit."""


@dataclass(frozen=True)
class Verdict:
    """Which artifact to deploy.

    Attributes:
        winner: Its name; None where none fits the budget.
        sentence: Why it is that one, or which comes closest.
    """

    winner: str | None
    sentence: str


def misses(row: Row, reference: Row, group: str, limits: Limits) -> dict[str, float]:
    """Return what a row misses in words, and by which share of the limit.

    Args:
        row: The artifact.
        reference: The float model.
        group: `budget` or `gate`, for the words.
        limits: `max_drop` (loss of accuracy against the reference, 0..1), `min_accuracy` (0..1), `latency_ms` or
            `max_latency_ms` (median at batch 1), `size_mb` or `max_size_mb` (10⁶ bytes).
    """
    accuracy, drop = _number(row["accuracy"]), _number(reference["accuracy"]) - _number(row["accuracy"])
    latency, size = _number(row["latency_ms_p50"]), row["bytes"] / 1e6
    found = {}
    for key, limit in limits.items():
        if limit is None:
            continue
        if key == "min_accuracy":
            over, text = limit - accuracy, f"accuracy {accuracy:.4f}"
        elif key == "max_drop":
            over, text = drop - limit, f"{100 * drop:.2f} points less than {reference['artifact']}"
        elif key.endswith("latency_ms"):
            over, text = latency - limit, f"{latency:.3g} ms"
        else:
            over, text = size - limit, f"{size:.3g} MB"
        if not over <= 1e-9:  # also when something is not a number
            found[f"{group}.{key}={limit:g}: {text}"] = over / max(limit, 0.01)
    return found


def judge(rows: Sequence[Row], budget: Limits) -> Verdict:
    """Return the fastest artifact at batch 1 within the budget; of those within 5 % of it the smallest file.

    Args:
        rows: One or more, the reference first.
        budget: `max_drop`, `latency_ms`, `size_mb`; see `misses`.
    """
    reference = rows[0]
    missed = {row["artifact"]: misses(row, reference, "budget", budget) for row in rows}
    fitting = [row for row in rows if not missed[row["artifact"]]]
    if not fitting:
        nearest = min(rows, key=lambda row: (len(missed[row["artifact"]]), sum(missed[row["artifact"]].values())))
        wants = "; ".join(missed[nearest["artifact"]])
        return Verdict(None, f"no artifact fits the budget; {nearest['artifact']} comes closest, missing {wants}")
    fastest = min(fitting, key=lambda row: float(row["latency_ms_p50"]))
    tied = [row for row in fitting if row["latency_ms_p50"] <= (1 + TIE) * fastest["latency_ms_p50"]]
    winner = min(tied, key=lambda row: int(row["bytes"]))
    limits = ", ".join(f"{key}={limit:g}" for key, limit in budget.items() if limit is not None) or "no limit"
    how = f"the fastest at batch 1 within budget ({limits})"
    if winner is not fastest:
        how = f"within {100 * TIE:g} % of the fastest at batch 1 ({fastest['artifact']}) and smaller, budget ({limits})"
    if winner is reference:
        return Verdict(winner["artifact"], f"winner: {winner['artifact']}, {how}")
    points = 100 * (winner["accuracy"] - reference["accuracy"])
    return Verdict(
        winner["artifact"],
        f"winner: {winner['artifact']}, {how}: {_speed(reference, winner):.1f}× the speed of {reference['artifact']}, "
        f"{100 * winner['bytes'] / reference['bytes']:.0f} % of its size, accuracy {points:+.2f} points",
    )


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a sentence for each float ONNX file that is hardly faster than PyTorch, and each INT8 file that is slower.

    Each is compared with the same network: `pruned+onnx` with `pruned`, `pruned+int8` with `pruned+onnx` where there
    is one, else with `pruned`.
    """
    by_name = {row["artifact"]: row for row in rows}
    for row in rows:
        stem, _, kind = row["artifact"].rpartition("+")
        dense = by_name.get(stem) if stem else rows[0]
        if dense is None:
            continue
        if kind == "onnx" and row["runtime"] == ONNXRUNTIME and dense["runtime"] == TORCH:
            speed = _speed(dense, row)
            if speed < GAIN:
                word = "slower than" if speed < 1 else "hardly faster than"
                yield f"{row['artifact']} is {word} {dense['artifact']} in PyTorch here: {_pair(speed, row, dense)}"
        elif kind in QUANTIZED:
            floating = by_name.get(f"{stem}+onnx" if stem else "onnx", dense)
            speed = _speed(floating, row)
            if speed < 1:
                slower = f"{row['artifact']} (INT8) is slower than {floating['artifact']} here"
                yield f"{slower}: {_pair(speed, row, floating)}"


def check_gate(rows: Sequence[Row], verdict: Verdict, gate: Limits) -> None:
    """See that the winner passes the gate.

    Args:
        rows: The reference first; empty where nothing could be judged.
        verdict: Of these rows.
        gate: `min_accuracy`, `max_drop`, `max_latency_ms`, `max_size_mb`; see `misses`.

    Raises:
        GateError: It misses a limit, or there is no winner while one is set.
    """
    if all(limit is None for limit in gate.values()):
        return
    fix = "All files are written; loosen the gate or the budget, train longer, or choose other compression=, export=."
    winner = next((row for row in rows if row["artifact"] == verdict.winner), None)
    if winner is None:
        raise GateError(f"gate: there is no winner to judge: {verdict.sentence}.\n{fix}")
    missed = misses(winner, rows[0], "gate", gate)
    if missed:
        raise GateError(f"gate: the winner {winner['artifact']} misses {'; '.join(missed)}.\n{fix}")


def _speed(base: Row, row: Row) -> float:
    return float(base["latency_ms_p50"]) / float(row["latency_ms_p50"])


def _pair(speed: float, row: Row, base: Row) -> str:
    return f"{speed:.2f}× the speed ({row['latency_ms_p50']:.3g} against {base['latency_ms_p50']:.3g} ms at batch 1)"


def _number(value: float | None) -> float:
    """Return a number as it was before JSON, which has null in place of NaN."""
    return math.nan if value is None else float(value)
