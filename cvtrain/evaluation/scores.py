"""How good answers are: the metrics of a split, each with a 95 % interval.

The pictures are drawn again with replacement a thousand times (Efron & Tibshirani, "An Introduction to the Bootstrap",
1993). The same number of pictures is always drawn in the same way, so what two sets of answers to the same pictures
come to in one draw belongs together, and the differences of their draws are those of a paired bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.core.metrics import measured, rates
from cvtrain.core.random import generator
from cvtrain.evaluation.calibration import BINS, to_probabilities
from cvtrain.evaluation.ensembles import Difference, compare
from cvtrain.evaluation.intervals import wilson

RESAMPLES = 1000
NAMES = (
    *("loss", "acc", "top5", "map", "balanced_acc", "precision", "recall", "f1", "f1_micro", "hamming"),
    *("auroc", "ece", "ece_uncalibrated"),
)
"""Metrics in the order in which they are told."""

_HELD = 2**19
"""Numbers of draws that are held at once; they stay in the processor's cache."""

Counts = NDArray[np.float64]
Ranking = tuple[float, NDArray[np.float64]]
"""A metric's value, and how it moves as each picture is drawn once more, `(N,)` of sum 0."""


@dataclass(frozen=True)
class Scores:
    """Metrics of one set of answers.

    Attributes:
        values: `loss` (of the logits as they are), `acc` (of several labels: all of them right), `top5` above five
            classes, `balanced_acc`, `precision`, `recall` and `f1` (means over the classes that are there), `auroc`
            (one class against the rest, mean over the classes with pictures of both kinds), `ece` and
            `ece_uncalibrated` (15 bins; of the probabilities with and without the temperature); of several labels also
            `map`, `f1_micro` and `hamming`. All but `loss` in 0..1, as scikit-learn defines them; NaN where there is
            none.
        draws: `(1000,)` float64 by metric: its values on pictures that are drawn again; not of `acc` and `top5`.
        right: `(N,)` by metric: of which pictures the answer is right; of `acc` and `top5`.
        errors: Intervals of the two calibration errors; see `error_interval`.
    """

    values: dict[str, float]
    draws: dict[str, NDArray[np.float64]]
    right: dict[str, NDArray[np.bool_]]
    errors: dict[str, tuple[float, float]]

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return the lower and upper bound of the 95 % interval by metric.

        Wilson's of `acc` and `top5`, which hold what they promise close to 1 too; percentiles of the draws of the
        others, but for the calibration errors. A metric has none where every draw is the same: it may have been luck.
        """
        found = {name: wilson(int(right.sum()), len(right)) for name, right in self.right.items()}
        for name, draws in self.draws.items():
            low, high = _percentiles(draws)
            if low < high:
                found[name] = self.errors.get(name, (low, high))
        return {name: found[name] for name in self.values if name in found}


def score(labels: NDArray[np.int64], logits: Tensor, temperature: float = 1.0) -> Scores:
    """Return the metrics of answers, with what their intervals are made of.

    Args:
        labels: `(N,)` class numbers, or `(N, K)` of 0 and 1; N of 1 or more.
        logits: `(N, K)` float on the CPU.
        temperature: What they are divided by before they become probabilities, above 0.
    """
    sample, count = _sample(labels, logits, temperature), len(labels)
    observed = {name: value[..., 0] for name, value in sample.metrics(np.ones((count, 1))).items()}
    values = {name: float(np.abs(value).sum()) for name, value in observed.items()}
    values |= measured(logits, torch.from_numpy(labels)).compute()
    parts = [sample.metrics(drawn) for drawn in _resamples(count)]
    draws = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in observed}
    right = {"acc": _right(labels, logits)}
    if "top5" in values:
        right["top5"] = (logits.topk(5, dim=1).indices.numpy() == labels[:, None]).any(1)
    return Scores(
        values={name: values[name] for name in NAMES if name in values},
        draws={name: np.abs(value).sum(0) if value.ndim == 2 else value for name, value in draws.items()},
        right=right,
        errors={name: error_interval(observed[name], draws[name]) for name in sample.gaps},
    )


def _percentiles(draws: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(draws, (2.5, 97.5)).tolist()
    return low, high


def error_interval(gaps: NDArray[np.float64], drawn: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % interval of a calibration error, by test inversion (Carpenter, JRSS B 61, 1999).

    Chance makes answers of few pictures look badly calibrated, so that an error is larger than the true one, and the
    error of pictures drawn again larger once more: percentiles of these hold the error of a calibrated model never.
    The interval has the errors from which chance could have made the one that was found. They are taken to be that one
    with all gaps between confidence and accuracy smaller or larger alike, and chance to be what it is in the draws.

    Args:
        gaps: `(15,)` by how much the answers of a bin are surer than right, times the bin's share; their absolute
            values add up to the error.
        drawn: `(15, R)`: the same of pictures that are drawn again.
    """
    error, chance = float(np.abs(gaps).sum()), drawn - gaps[:, None]
    # From no error at all, step by step, to twice the one that was found.
    steps = np.linspace(0, 2, 41)
    bounds = np.array([_percentiles(np.abs(step * gaps[:, None] + chance).sum(0)) for step in steps])
    highest, lowest = (float(np.interp(error, bounds[:, side], steps)) * error for side in (0, 1))
    return lowest, highest


def difference(ours: Scores, theirs: Scores, name: str) -> Difference | None:
    """Return by how much a metric of `ours` is larger on the same pictures; None where every draw is the same.

    Chance adds to a calibration error, and in the draws once more. Their interval is therefore mirrored at the
    difference (the "basic" bootstrap interval: Davison & Hinkley, "Bootstrap Methods and their Application", 1997).
    """
    if name in ours.right:
        return compare(ours.right[name], theirs.right[name])
    value = ours.values[name] - theirs.values[name]
    low, high = _percentiles(ours.draws[name] - theirs.draws[name])
    if name in ours.errors:
        low, high = 2 * value - high, 2 * value - low
    return Difference(value, low, high) if low < high else None


def _right(labels: NDArray[np.int64], logits: Tensor) -> NDArray[np.bool_]:
    answers = (logits >= 0) if labels.ndim == 2 else logits.argmax(1)
    right: NDArray[np.bool_] = (answers.numpy() == labels).reshape(len(labels), -1).all(1)
    return right


def _resamples(count: int) -> Iterator[Counts]:
    """Yield how often each of `count` pictures is drawn, `(count, R)`, in parts of 1000 columns in all."""
    rng = generator("bootstrap", count)
    width = max(1, _HELD // count)
    for first in range(0, RESAMPLES, width):
        columns = min(width, RESAMPLES - first)
        cells = rng.integers(0, count, (count, columns)) * columns + np.arange(columns)
        yield np.bincount(cells.ravel(), minlength=count * columns).reshape(count, columns).astype(np.float64)


@dataclass(frozen=True)
class _Sample:
    """What each picture adds to the metrics, so that they can be asked for with any number of each picture.

    Attributes:
        sums: `(N,)` by metric that is a mean over pictures.
        table: Sparse `(K, N)` of 0 and 1: which answers are hits, which class is predicted, which is there.
        rankings: Those that rank the pictures.
        gaps: By metric `(N, 15)`: by how much the confidence of a picture's answer is too high, in the answer's bin.
        multilabel: Whether a picture may have several labels.
    """

    sums: Mapping[str, NDArray[np.float64]]
    table: tuple[Any, Any, Any]
    rankings: Mapping[str, Ranking]
    gaps: Mapping[str, NDArray[np.float64]]
    multilabel: bool

    def metrics(self, drawn: Counts) -> dict[str, NDArray[np.float64]]:
        """Return the metrics `(R,)` of the pictures with each drawn `(N, R)` times, and their gaps `(15, R)`.

        Those that rank the pictures are taken for linear in the numbers (the infinitesimal jackknife: Jaeckel 1972;
        Efron, "The Jackknife, the Bootstrap and Other Resampling Plans", 1982, chapter 6): to sort a thousand times
        for every class would take minutes.
        """
        count = len(drawn)
        found = {name: each @ drawn / count for name, each in self.sums.items()}
        hits, predicted, support = (rows @ drawn for rows in self.table)
        there = support > 0
        for name, table in rates(hits, predicted, support).items():
            found[name] = (table * there).sum(0) / np.maximum(there.sum(0), 1)
        if self.multilabel:
            found["f1_micro"] = 2 * hits.sum(0) / np.maximum(predicted.sum(0) + support.sum(0), 1)
        else:
            found["balanced_acc"] = found["recall"]
        for name, (value, influence) in self.rankings.items():
            found[name] = np.clip(value + influence @ drawn, 0, 1)
        for name, gaps in self.gaps.items():
            found[name] = gaps.T @ drawn / count
        return found


def _sample(labels: NDArray[np.int64], logits: Tensor, temperature: float) -> _Sample:
    from scipy.sparse import csr_array

    multilabel, targets = labels.ndim == 2, torch.from_numpy(labels)
    calibrated, plain = (to_probabilities(logits, scale, multilabel) for scale in (temperature, 1.0))
    there, given = _one_hot(labels, logits)
    table = [csr_array(rows.T).astype(np.float64) for rows in (there & given, given, there)]
    rankings = {"auroc": _macro(area_under_roc, (logits if multilabel else calibrated).numpy(), there)}
    if multilabel:
        losses = F.binary_cross_entropy_with_logits(logits.double(), targets.double(), reduction="none").mean(1)
        sums = {"loss": losses.numpy(), "hamming": (there != given).mean(1)}
        rankings["map"] = _macro(precision_at_positives, logits.numpy(), there)
    else:
        sums = {"loss": F.cross_entropy(logits.double(), targets, reduction="none").numpy()}
    gaps = {"ece": _gaps(calibrated, labels), "ece_uncalibrated": _gaps(plain, labels)}
    return _Sample(sums, (table[0], table[1], table[2]), rankings, gaps, multilabel)


def _one_hot(labels: NDArray[np.int64], logits: Tensor) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return `(N, K)`: which classes are there, and which are predicted."""
    if labels.ndim == 2:
        return labels.astype(bool), (logits >= 0).numpy()
    classes = np.arange(logits.shape[1])
    return labels[:, None] == classes, logits.argmax(1).numpy()[:, None] == classes


def _macro(
    curve: Callable[[NDArray[Any], NDArray[np.bool_]], Ranking | None], scores: NDArray[Any], there: NDArray[np.bool_]
) -> Ranking:
    """Return the mean of a metric over the classes that have one; NaN where none has."""
    if not np.isfinite(scores).all():
        return np.nan, np.zeros(len(scores))
    total, influence, count = 0.0, np.zeros(len(scores)), 0
    for k in range(scores.shape[1]):
        found = curve(scores[:, k], there[:, k])
        if found is not None:
            total, influence, count = total + found[0], influence + found[1], count + 1
    return (total / count, influence / count) if count else (np.nan, influence)


def area_under_roc(scores: NDArray[Any], positive: NDArray[np.bool_]) -> Ranking | None:
    """Return the area under the ROC curve: how often a positive has the higher score of a pair; equals count half.

    How it moves with each picture is that picture's share of pairs won (DeLong, DeLong & Clarke-Pearson, Biometrics 44,
    1988).

    Args:
        scores: `(N,)` finite, higher for likelier.
        positive: `(N,)`.

    Returns:
        The area, and by how much it grows as each picture is drawn once more, `(N,)`; None where all pictures are of
        one kind.
    """
    above, below = np.sort(scores[positive]), np.sort(scores[~positive])
    if not len(above) or not len(below):
        return None
    won = np.empty(len(scores))
    won[positive] = _share_below(scores[positive], below)
    won[~positive] = 1 - _share_below(scores[~positive], above)
    area = float(won[positive].mean())
    return area, (won - area) / np.where(positive, len(above), len(below))


def _share_below(values: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float64]:
    """Return of each of `values` the share of `others`, in rising order, that are less; equals count half."""
    less, more = (np.searchsorted(others, values, side) for side in ("left", "right"))
    share: NDArray[np.float64] = (less + more) / (2 * len(others))
    return share


def precision_at_positives(scores: NDArray[Any], positive: NDArray[np.bool_]) -> Ranking | None:
    """Return the average precision, and how it moves with each picture; see `core.metrics.average_precision`.

    Args:
        scores: `(N,)` finite, higher for likelier.
        positive: `(N,)`.

    Returns:
        The mean over the positives of the precision at their score, and its derivative by the number of times each
        picture is there, `(N,)`; None without a positive.
    """
    if not positive.any():
        return None
    order = np.argsort(-scores, kind="stable")
    falling, hit = -scores[order], positive[order].astype(np.float64)
    first, taken = np.searchsorted(falling, falling, "left"), np.searchsorted(falling, falling, "right")
    found = hit.cumsum()[taken - 1]
    precision, total = found / taken, hit.sum()
    value = float((precision * hit).sum() / total)
    # One more picture is one more that is taken, and when positive found, at its own score and at all lower ones.
    one_more_found, one_more_taken = (_at_and_after(term, first) for term in (hit / taken, hit * found / taken**2))
    influence = np.empty(len(scores))
    influence[order] = (hit * (precision - value + one_more_found) - one_more_taken) / total
    return value, influence


def _at_and_after(terms: NDArray[np.float64], first: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the sums of `terms` from each position of `first` to the end."""
    rest: NDArray[np.float64] = terms[::-1].cumsum()[::-1][first]
    return rest


def sureness(probabilities: Tensor, labels: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """Return how sure each answer is, 0..1, whether it is right, 0 or 1, and its bin of 15, 0..14.

    An answer is the likeliest class; of several labels each is one, right where the label is there.

    Args:
        probabilities: `(N, K)` in 0..1.
        labels: `(N,)` class numbers, or `(N, K)` of 0 and 1.

    Returns:
        Float64, float64 and int64, `(N, 1)`, or of several labels `(N, K)`.
    """
    targets = torch.from_numpy(labels)
    if targets.ndim == 2:
        confidence, right = probabilities, targets
    else:
        top = probabilities.max(dim=1, keepdim=True)
        confidence, right = top.values, top.indices == targets[:, None]
    confidence = confidence.double()
    return confidence, right.double(), (confidence * BINS).long().clamp(0, BINS - 1)


def _gaps(probabilities: Tensor, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return `(N, 15)`: by how much the answers of each bin are surer than right, a mean over a picture's answers."""
    confidence, right, bins = sureness(probabilities, labels)
    gaps = torch.zeros(len(labels), BINS, dtype=torch.float64)
    gaps.scatter_add_(1, bins, (confidence - right) / confidence.shape[1])
    found: NDArray[np.float64] = gaps.numpy()
    return found


@dataclass(frozen=True)
class Reliability:
    """How often answers are right that are so sure (DeGroot & Fienberg, The Statistician 32, 1983).

    Attributes:
        count: `(15,)` int64: answers in each bin of confidence, of equal width.
        confidence: `(15,)`: how sure they are, 0..1; NaN in an empty bin.
        accuracy: `(15,)`: which share of them is right, 0..1; NaN in an empty bin.
        low: `(15,)`: lower bound of its 95 % interval (Wilson); 0 in an empty bin.
        high: `(15,)`: upper bound of it; 1 in an empty bin.
    """

    count: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def reliability(probabilities: Tensor, labels: NDArray[np.int64]) -> Reliability:
    """Return the reliability of probabilities `(N, K)`; `labels` as for `sureness`."""
    confidence, right, bins = (values.numpy().ravel() for values in sureness(probabilities, labels))
    count = np.bincount(bins, minlength=BINS)
    known = np.where(count, count, np.nan)
    sure, hits = (np.bincount(bins, weights=values, minlength=BINS) for values in (confidence, right))
    low, high = np.array([wilson(int(h), int(n)) for h, n in zip(hits, count, strict=True)]).T
    return Reliability(count, sure / known, hits / known, low, high)
