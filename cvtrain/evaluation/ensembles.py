"""Several models that answer together: mean, weighted mean, vote; and whether that beats the best of them.

Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", NeurIPS 2017:
the mean of the probabilities of networks that differ in nothing but their seed is more often right than each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.evaluation.intervals import paired_bootstrap

FLOOR = 1e-12
"""The least probability that fitting takes a model at its word for: one sure error must not decide everything."""


def average(probabilities: Sequence[Tensor], shares: NDArray[np.float64]) -> Tensor:
    """Return the weighted mean of what M models say.

    Args:
        probabilities: M times `(N, K)` in 0..1, calibrated.
        shares: `(M,)` weights, 0 or more, of sum 1.

    Returns:
        `(N, K)` float64 in 0..1.
    """
    total = torch.zeros(probabilities[0].shape, dtype=torch.float64)
    for given, share in zip(probabilities, shares.tolist(), strict=True):
        total += share * given.double()
    return total


def vote(probabilities: Sequence[Tensor], multilabel: bool) -> Tensor:
    """Return the answer of the majority of M models, as probabilities; ties go to what the mean holds for likelier.

    The mean of the probabilities is counted as one more voter, who may split his vote. That decides ties and nothing
    else, and leaves no class a probability of zero.

    Args:
        probabilities: M times `(N, K)` in 0..1, calibrated.
        multilabel: Whether each class is decided by itself, at 0.5; otherwise a model votes for its likeliest class.

    Returns:
        `(N, K)` float64 in 0..1: `(votes + mean) / (M + 1)`. The likeliest class, or the labels at 0.5 or more, are the
        majority's.
    """
    count = len(probabilities)
    total = average(probabilities, np.full(count, 1 / count))
    for given in probabilities:
        if multilabel:
            total += given >= 0.5
        else:
            total.scatter_add_(1, given.argmax(1, keepdim=True), torch.ones(len(given), 1, dtype=torch.float64))
    return total / (count + 1)


def fit_weights(probabilities: Sequence[Tensor], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the weights of the mean under which the labels are likeliest.

    The negative log-likelihood of a mixture is convex in its weights, so there is one minimum on the simplex; SciPy's
    SLSQP finds it.

    Args:
        probabilities: M times `(N, K)` in 0..1, calibrated, of samples that no model was trained on.
        labels: `(N,)` class numbers, or `(N, K)` of 0 and 1.

    Returns:
        `(M,)` float64, 0 or more, of sum 1; all the same where nothing is to be learnt: no samples, numbers that are
        not finite, or no weights that are better.
    """
    from scipy.optimize import minimize  # half a second that others need not wait for

    count = len(probabilities)
    same = np.full(count, 1 / count)
    likely = np.stack([_likelihood(given, labels) for given in probabilities])
    if not likely.size or not np.isfinite(likely).all():
        return same

    def loss(shares: NDArray[np.float64]) -> float:
        return float(-np.log(shares @ likely).mean())

    def slope(shares: NDArray[np.float64]) -> NDArray[np.float64]:
        gradient: NDArray[np.float64] = -(likely / (shares @ likely)).mean(1)
        return gradient

    found = minimize(
        loss, same, jac=slope, method="SLSQP", bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda shares: shares.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-10, "maxiter": 200},
    )  # fmt: skip
    shares: NDArray[np.float64] = np.clip(found.x, 0, None)
    shares /= shares.sum()
    return shares if loss(shares) < loss(same) else same


def _likelihood(probabilities: Tensor, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how likely a model holds each label that is true: `(N,)`, or of several labels `(N · K,)`."""
    given = probabilities.double().numpy()
    if labels.ndim == 2:
        found = np.where(labels == 1, given, 1 - given).ravel()
    else:
        found = given[np.arange(len(labels)), labels]
    likely: NDArray[np.float64] = np.maximum(found, FLOOR)
    return likely


class Difference(NamedTuple):
    """How much more accurate one is than another on the same samples.

    Attributes:
        value: Difference of the shares of right answers, -1..1.
        low: Lower bound of its 95 % interval, paired bootstrap.
        high: Upper bound of it.
    """

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Return `better`, `worse`, or `not distinguishable` where the interval holds 0."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "not distinguishable"

    def __str__(self) -> str:
        """Return it in points: `+0.56 points [95 %: -0.28, +1.39]`."""
        return f"{100 * self.value:+.2f} points [95 %: {100 * self.low:+.2f}, {100 * self.high:+.2f}]"


def compare(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> Difference:
    """Return how much more often `ours` is right than `theirs`, both `(N,)`, N of 1 or more: which answers are right.

    Raises:
        CvtrainError: No samples.
    """
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    return Difference(*paired_bootstrap(only_ours, only_theirs, len(ours)))
