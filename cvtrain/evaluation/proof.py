"""The proof: every artifact runs in its own runtime on the evaluation set, and the table says what it is worth."""

from __future__ import annotations

import csv
import dataclasses
import gc
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cvtrain.core.artifact import Artifact
from cvtrain.core.files import write_atomic
from cvtrain.errors import CvtrainError, DataError, DivergedError
from cvtrain.evaluation.intervals import paired_difference
from cvtrain.evaluation.runners import Runner, load_runner

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Yields float32 normalised images `(B, C, H, W)` and labels, `(B,)` or `(B, K)`, on the CPU."""

Decide = Callable[[Tensor], Tensor]
"""Turns logits `(B, K)` into answers of the labels' shape."""

MIN_FLOAT_AGREEMENT = 0.999
_LOSSY = ("int8", "pruned")
_WARMUP_RUNS = 10


@dataclass(frozen=True)
class ProofRow:
    """One artifact, as measured; the fields but `note` are the columns of artifacts.csv.

    Attributes:
        artifact: Its name.
        file: Its file, relative to the run folder where it lies inside.
        runtime: What ran it.
        accuracy: Share of right answers, 0..1.
        delta: Accuracy minus the reference's, -1..1.
        delta_low: Lower bound of the paired 95 % interval of `delta`.
        delta_high: Upper bound of it.
        agreement: Share of samples with the same answer as the reference, 0..1.
        max_logit_error: Largest absolute difference to the reference's logits; NaN where a logit is.
        params: Number of parameters.
        macs: Multiply-accumulates for one picture.
        bytes: Size on disk.
        latency_ms_p50: Median milliseconds for one picture.
        latency_ms_p95: 95th percentile of them.
        note: What a reader should know.
    """

    artifact: str
    file: str
    runtime: str
    accuracy: float
    delta: float
    delta_low: float
    delta_high: float
    agreement: float
    max_logit_error: float
    params: int
    macs: int
    bytes: int
    latency_ms_p50: float
    latency_ms_p95: float
    note: str = ""


@dataclass
class _Tally:
    """Counts over the evaluation set, of one artifact against the reference."""

    total: int = 0
    correct: int = 0
    only_this: int = 0
    only_reference: int = 0
    agreed: int = 0
    max_error: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, logits: Tensor, reference: Tensor, labels: Tensor, decide: Decide) -> None:
        answer, expected = decide(logits), decide(reference)
        right, reference_right = _same(answer, labels), _same(expected, labels)
        self.total += len(labels)
        self.correct += int(right.sum())
        self.only_this += int((right & ~reference_right).sum())
        self.only_reference += int((reference_right & ~right).sum())
        self.agreed += int(_same(answer, expected).sum())
        # torch.maximum, unlike max, keeps a NaN.
        self.max_error = torch.maximum(self.max_error, (logits - reference).abs().max())


def _same(answers: Tensor, others: Tensor) -> Tensor:
    """Return `(B,)` bool: whether all of an answer is the same."""
    return (answers == others).reshape(len(answers), -1).all(1)


def prove(
    reference: Artifact,
    artifacts: Sequence[Artifact],
    batches: Batches,
    example: Tensor,
    threads: int,
    latency_runs: int = 60,
    run_folder: Path | None = None,
    decide: Decide = lambda logits: logits.argmax(1),
) -> list[ProofRow]:
    """Judge every artifact beside the reference, each loaded fresh from its file.

    Args:
        reference: What the others are compared with, the float model.
        artifacts: The others.
        batches: Starts a pass over the evaluation set; read once.
        example: `(1, C, H, W)` float32 normalised input for the latency.
        threads: Threads inside one operator, for every runtime.
        latency_runs: Timed runs of each artifact, 1 or more.
        run_folder: Paths inside it are given relative to it.
        decide: The task's; an answer is right when all of it equals the labels.

    Returns:
        One row an artifact, the reference first.

    Raises:
        DataError: The evaluation set is empty.
        WeightsError: A file is missing, damaged or of another model.
        DivergedError: The reference gives logits that are not finite.
        CvtrainError: A float artifact gives other answers than the reference.
    """
    everything = [reference, *artifacts]
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runners = [load_runner(artifact, threads) for artifact in everything]
        tallies = _evaluate(runners, batches, decide)
        if not math.isfinite(float(tallies[0].max_error)):
            raise DivergedError(
                f"the reference {reference.name!r} gives logits that are not finite: nothing can be compared with it.\n"
                "Train again with a smaller optimizer.lr."
            )
        # Before the latency: a wrong file is not worth timing.
        for artifact, tally in zip(everything, tallies, strict=True):
            _check_float(artifact, tally)
        latencies = measure_latency(runners, example[:1].contiguous(), latency_runs)
    finally:
        torch.set_num_threads(threads_before)
    return [
        _row(artifact, tally, times, run_folder, is_reference=position == 0)
        for position, (artifact, tally, times) in enumerate(zip(everything, tallies, latencies, strict=True))
    ]


def _evaluate(runners: Sequence[Runner], batches: Batches, decide: Decide) -> list[_Tally]:
    tallies = [_Tally() for _ in runners]
    for images, labels in batches():
        reference = runners[0](images)
        for position, (runner, tally) in enumerate(zip(runners, tallies, strict=True)):
            tally.add(runner(images) if position else reference, reference, labels, decide)
    if not tallies[0].total:
        raise DataError("the evaluation set is empty: there is nothing to prove an artifact on")
    return tallies


def _check_float(artifact: Artifact, tally: _Tally) -> None:
    if any(label in artifact.name for label in _LOSSY):
        return
    agreement = tally.agreed / tally.total
    if agreement < MIN_FLOAT_AGREEMENT or not math.isfinite(float(tally.max_error)):
        raise CvtrainError(
            f"artifact {artifact.name!r} is not the model it was made from: {artifact.path} gives the same answer on "
            f"{100 * agreement:.2f} % of {tally.total} samples (at least {100 * MIN_FLOAT_AGREEMENT:g} % expected), "
            f"logits off by up to {float(tally.max_error):.3g}.\nDo not deploy it; export again, or leave it out."
        )


def measure_latency(
    runners: Sequence[Runner], example: Tensor, runs: int, warmup: int = _WARMUP_RUNS
) -> list[list[float]]:
    """Time the runners in turn, so that a slow moment of the machine hits all of them alike.

    Args:
        runners: What to time.
        example: The input of every call.
        runs: Timed calls of each.
        warmup: Calls of each before.

    Returns:
        For each runner, `runs` latencies in milliseconds.
    """
    for runner in runners:
        for _ in range(warmup):
            runner(example)
    times: list[list[float]] = [[] for _ in runners]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(runs):
            for runner, measured in zip(runners, times, strict=True):
                # Unwatched: fetches its weights back into the cache from which the others pushed them.
                runner(example)
                start = time.perf_counter_ns()
                runner(example)
                measured.append((time.perf_counter_ns() - start) / 1e6)
    finally:
        if collecting:
            gc.enable()
    return times


def _row(
    artifact: Artifact, tally: _Tally, times: list[float], run_folder: Path | None, *, is_reference: bool
) -> ProofRow:
    # Against itself there is nothing to estimate.
    delta, low, high = (
        (0.0, 0.0, 0.0) if is_reference else paired_difference(tally.only_this, tally.only_reference, tally.total)
    )
    p50, p95 = (float(value) for value in np.percentile(times, (50, 95)))
    return ProofRow(
        artifact=artifact.name,
        file=_shown_path(artifact.path, run_folder),
        runtime=artifact.runtime,
        accuracy=tally.correct / tally.total,
        delta=delta,
        delta_low=low,
        delta_high=high,
        agreement=tally.agreed / tally.total,
        max_logit_error=float(tally.max_error),
        params=artifact.params,
        macs=artifact.macs,
        bytes=_size(artifact.path),
        latency_ms_p50=p50,
        latency_ms_p95=p95,
        note=artifact.note,
    )


def _shown_path(path: Path, run_folder: Path | None) -> str:
    if run_folder is not None and path.resolve().is_relative_to(run_folder.resolve()):
        return path.resolve().relative_to(run_folder.resolve()).as_posix()
    return str(path)


def _size(path: Path) -> int:
    """Return the bytes of a file and of the `.data` file beside it, where ONNX keeps weights above 2 GB."""
    outside = path.with_name(path.name + ".data")
    return path.stat().st_size + (outside.stat().st_size if outside.is_file() else 0)


COLUMNS = tuple(entry.name for entry in dataclasses.fields(ProofRow) if entry.name != "note")
"""The columns of artifacts.csv, in order."""


def write_artifacts_csv(rows: Sequence[ProofRow], path: Path) -> None:
    """Write the rows as CSV with a header, durably.

    Args:
        rows: The reference first.
        path: The `.csv` file.

    Raises:
        StorageError: The disk is full or read-only; an old file stands.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        values = (getattr(row, name) for name in COLUMNS)
        writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in values)
    write_atomic(path, text.getvalue())
