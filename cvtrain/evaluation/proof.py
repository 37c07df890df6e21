"""The proof: every artifact runs from its own file on the evaluation set, and the table says what it is worth."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.core.artifact import Artifact
from cvtrain.errors import CvtrainError, DataError, DivergedError, Interrupted
from cvtrain.evaluation.calibration import CalibrationError, to_logits, to_probabilities
from cvtrain.evaluation.intervals import paired_bootstrap
from cvtrain.evaluation.latency import Latency, measure
from cvtrain.evaluation.table import ProofRow, weigh
from cvtrain.runtime.base import Running, Start
from cvtrain.runtime.prepare import class_names, temperature

MIN_EXACT_AGREEMENT = 0.999
MAX_EXACT_ERROR = 1e-3
"""Of the reference's largest logit, or of 1 where all are smaller."""


@dataclass(frozen=True)
class EvaluationSet:
    """What artifacts are judged on.

    Attributes:
        batches: Starts a pass over it: uint8 pictures as they are read, `(B, C, resize, resize)`, and labels, `(B,)`
            of class numbers or `(B, K)` of 0 and 1, on any device.
        class_names: K names; a label is a position in this list.
        decide: The task's; turns logits `(B, K)` into answers of the labels' shape. An answer is right when all of it
            equals the labels.
    """

    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    class_names: Sequence[str]
    decide: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Proof:
    """What came of it.

    Attributes:
        rows: Of the artifacts that passed, the reference first.
        failures: The others, and what is wrong with each.
    """

    rows: list[ProofRow]
    failures: list[tuple[Artifact, CvtrainError]]


@dataclass(frozen=True)
class _Answers:
    """Logits and probabilities `(B, K)` in the order of the run's classes."""

    logits: Tensor
    probabilities: Tensor


@dataclass
class _Tally:
    """Counts over the evaluation set, of one artifact against the reference."""

    total: int = 0
    correct: int = 0
    only_this: int = 0
    only_reference: int = 0
    agreed: int = 0
    max_error: Tensor = field(default_factory=lambda: torch.zeros(()))
    scale: float = 1.0
    calibration: CalibrationError = field(default_factory=CalibrationError)

    def add(
        self, given: _Answers, reference: _Answers, labels: Tensor, decide: Callable[[Tensor], Tensor], embedded: bool
    ) -> None:
        answer, expected = decide(given.logits), decide(reference.logits)
        right, reference_right = _same(answer, labels), _same(expected, labels)
        self.total += len(labels)
        self.correct += int(right.sum())
        self.only_this += int((right & ~reference_right).sum())
        self.only_reference += int((reference_right & ~right).sum())
        self.agreed += int(_same(answer, expected).sum())
        ours, theirs = (given.probabilities, reference.probabilities) if embedded else (given.logits, reference.logits)
        # torch.maximum, unlike max, keeps a NaN.
        self.max_error = torch.maximum(self.max_error, (ours - theirs).abs().max())
        self.scale = max(self.scale, float(theirs.abs().max()))
        self.calibration.add(given.probabilities, labels)

    @property
    def agreement(self) -> float:
        return self.agreed / self.total


def _same(answers: Tensor, others: Tensor) -> Tensor:
    """Return `(B,)` bool: whether all of an answer is the same."""
    return (answers == others).reshape(len(answers), -1).all(1)


class _Candidate:
    """One artifact on its way through the proof; the first thing that goes wrong with it stays its `error`."""

    _worker: Running

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.error: CvtrainError | None = None
        self.tally = _Tally()
        self.memory = math.nan
        self._columns: list[int] = []
        self._temperature = 1.0

    @property
    def metadata(self) -> dict[str, str]:
        return self._worker.metadata

    @property
    def embedded(self) -> bool:
        return self._worker.embedded

    @contextmanager
    def watched(self) -> Iterator[None]:
        try:
            yield
        except Interrupted:
            raise
        except CvtrainError as error:
            self.error = error

    def start(self, start: Start, stack: ExitStack) -> None:
        """Start it; `stack` closes it."""
        self._worker = stack.enter_context(closing(start(self.artifact)))

    def load(self, names: Sequence[str]) -> None:
        """Wait until it is loaded, and find the column of each of the run's classes."""
        path = self.artifact.path
        own = class_names(self._worker.metadata, path)
        if sorted(own) != sorted(names):
            unknown, missing = sorted(set(own) - set(names)), sorted(set(names) - set(own))
            raise CvtrainError(
                f"artifact {self.artifact.name!r} is not of this run: {path} has {len(own)} classes, the run "
                f"{len(names)}; only the file has {unknown[:5]}, only the run {missing[:5]}.\nExport it again."
            )
        self._columns = [own.index(name) for name in names]
        self._temperature = temperature(self._worker.metadata, path)
        self.memory = self._worker.memory()

    def answer(self, images: NDArray[np.uint8], multilabel: bool) -> _Answers:
        """Answer pictures `(B, C, resize, resize)`."""
        given = torch.from_numpy(self._worker.run(images))[:, self._columns]
        if self.embedded:
            return _Answers(to_logits(given, self._temperature, multilabel), given)
        return _Answers(given, to_probabilities(given, self._temperature, multilabel))

    def time(self, batch: int, runs: int) -> list[float]:
        """Time it; see `Running.time`."""
        with self.watched():
            return self._worker.time(batch, runs)
        raise _LostError


class _LostError(Exception):
    """A candidate has failed while all were timed."""


def prove(
    reference: Artifact,
    artifacts: Sequence[Artifact],
    evaluation: EvaluationSet,
    start: Start,
    *,
    run_folder: Path | None = None,
    batch: int = 32,
    runs: int = 60,
) -> Proof:
    """Judge every artifact beside the reference, each loaded fresh from its file and fed as its file says.

    Args:
        reference: What the others are compared with, the float model.
        artifacts: The others.
        evaluation: Read once.
        start: Starts an artifact: `command.worker.isolated`.
        run_folder: Paths inside it are given relative to it.
        batch: Pictures a call of the second latency, 1 or more; the first is of single pictures.
        runs: Timed calls of each artifact, 1 or more.

    Returns:
        One row for each artifact that passed. One fails that cannot be loaded or run; that should be exact and gives
        other answers than the reference; or that may give others and says otherwise how it wants to be fed.

    Raises:
        DataError: The evaluation set is empty.
        DivergedError: The reference gives logits that are not finite.
        CvtrainError: The reference cannot be loaded or run.
    """
    first, *others = candidates = [_Candidate(artifact) for artifact in (reference, *artifacts)]
    with ExitStack() as stack:
        for candidate in candidates:  # they load side by side
            with candidate.watched():
                candidate.start(start, stack)
        for candidate in candidates:
            if candidate.error is None:
                with candidate.watched():
                    candidate.load(evaluation.class_names)
        if first.error is not None:
            raise first.error
        _evaluate(first, others, evaluation)
        if not math.isfinite(float(first.tally.max_error)):
            raise DivergedError(
                f"the reference {reference.name!r} gives logits that are not finite: nothing can be compared with it.\n"
                "Train again with a smaller optimizer.lr."
            )
        # Before the latency: a wrong file is not worth timing.
        for candidate in others:
            if candidate.error is None:
                with candidate.watched():
                    _check(candidate, first)
        single = _timed(candidates, 1, runs)
        several = _timed(candidates, batch, runs)
        passed = [candidate for candidate in candidates if candidate.error is None]
    return Proof(
        rows=[_row(found, single[id(found)], several[id(found)], run_folder, found is first) for found in passed],
        failures=[(other.artifact, other.error) for other in others if other.error is not None],
    )


def _evaluate(first: _Candidate, others: Sequence[_Candidate], evaluation: EvaluationSet) -> None:
    for images, given in evaluation.batches():
        pixels, labels = images.cpu().contiguous().numpy(), given.cpu()
        multilabel = labels.ndim == 2
        expected = first.answer(pixels, multilabel)
        first.tally.add(expected, expected, labels, evaluation.decide, first.embedded)
        for candidate in others:
            if candidate.error is None:
                with candidate.watched():
                    answers = candidate.answer(pixels, multilabel)
                    candidate.tally.add(answers, expected, labels, evaluation.decide, candidate.embedded)
    if not first.tally.total:
        raise DataError("the evaluation set is empty: there is nothing to prove an artifact on")


def _check(candidate: _Candidate, first: _Candidate) -> None:
    artifact, tally, own, expected = candidate.artifact, candidate.tally, candidate.metadata, first.metadata
    names = _other_names(own, expected, first.artifact.name)
    use = _other_use(own, expected, first.artifact.name)
    error, allowed = float(tally.max_error), MAX_EXACT_ERROR * tally.scale
    if artifact.exact and not (tally.agreement >= MIN_EXACT_AGREEMENT and error <= allowed):
        raise CvtrainError(
            f"artifact {artifact.name!r} is not the model it was made from: {artifact.path} gives the same answer on "
            f"{100 * tally.agreement:.2f} % of {tally.total} samples ({100 * MIN_EXACT_AGREEMENT:g} % expected), "
            f"{'probabilities' if candidate.embedded else 'logits'} off by up to {error:.3g} (at most {allowed:.3g}).\n"
            f"{names or use or 'Class names and preprocessing are the same; its weights or its graph differ'}.\n"
            "Do not deploy it; export again, or leave it out."
        )
    # Answers that may differ cannot tell. And none tell how pictures are read: this process has read them.
    wrong = use if artifact.exact else names or use
    if wrong is not None:
        raise CvtrainError(
            f"artifact {artifact.name!r}: {artifact.path} would be used wrongly.\n{wrong}. Make it again."
        )


def _other_names(own: dict[str, str], expected: dict[str, str], reference: str) -> str | None:
    """Say in words where a file has its classes in another order than the reference."""
    pairs = zip(*(json.loads(metadata["class_names"]) for metadata in (own, expected)), strict=True)
    for position, (name, other) in enumerate(pairs):
        if name != other:
            return f"Its class names are in another order: class {position} is {name!r}, in {reference!r} {other!r}"
    return None


def _other_use(own: dict[str, str], expected: dict[str, str], reference: str) -> str | None:
    """Say in words what a file says otherwise about its preprocessing and its answers than the reference."""
    values, others = (json.loads(metadata["preprocess"]) for metadata in (own, expected))
    for key in ("mean", "std", "img_size", "resize", "channels", "interpolation"):
        if values.get(key) != others.get(key):
            return f"Its preprocessing has {key}={values.get(key)}, that of {reference!r} {key}={others.get(key)}"
    for key in ("task", "temperature"):
        if own.get(key) != expected.get(key):
            return f"Its {key} is {own.get(key)}, that of {reference!r} {expected.get(key)}"
    return None


def _timed(candidates: Sequence[_Candidate], batch: int, runs: int) -> dict[int, Latency]:
    """Time those without an error; when one fails meanwhile, the others are timed again without it."""
    while True:
        timed = [candidate for candidate in candidates if candidate.error is None]
        try:
            return {id(each): found for each, found in zip(timed, measure(timed, batch, runs), strict=True)}
        except _LostError:
            if candidates[0].error is not None:
                raise candidates[0].error from None


def _row(
    candidate: _Candidate, single: Latency, several: Latency, run_folder: Path | None, is_reference: bool
) -> ProofRow:
    artifact, tally = candidate.artifact, candidate.tally
    # Against itself there is nothing to estimate.
    delta, low, high = (
        (0.0, 0.0, 0.0) if is_reference else paired_bootstrap(tally.only_this, tally.only_reference, tally.total)
    )
    weight = weigh(artifact.path)
    return ProofRow(
        artifact=artifact.name,
        file=_shown_path(artifact.path, run_folder),
        runtime=artifact.runtime,
        accuracy=tally.correct / tally.total,
        delta=delta,
        delta_low=low,
        delta_high=high,
        agreement=tally.agreement,
        max_logit_error=float(tally.max_error),
        ece=tally.calibration.compute(),
        params=artifact.params,
        macs=artifact.macs,
        bytes=weight.size,
        gzip_bytes=weight.gzipped,
        latency_ms_p50=single.p50,
        latency_ms_p95=single.p95,
        batch=several.batch,
        latency_batch_ms_p50=several.p50,
        latency_batch_ms_p95=several.p95,
        memory_mb=candidate.memory,
        sha256=weight.sha256,
        exact=artifact.exact,
        note=artifact.note,
    )


def _shown_path(path: Path, run_folder: Path | None) -> str:
    if run_folder is not None and path.resolve().is_relative_to(run_folder.resolve()):
        return path.resolve().relative_to(run_folder.resolve()).as_posix()
    return str(path.absolute())
