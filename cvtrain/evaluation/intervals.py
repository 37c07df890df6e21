"""Confidence intervals of accuracies."""

from __future__ import annotations

import math

import numpy as np

from cvtrain.core.random import generator
from cvtrain.errors import CvtrainError

Z_95 = 1.959964
DRAWS = 10_000


def wilson(correct: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson score interval of an accuracy (Wilson, JASA 22, 1927).

    Args:
        correct: How many are right, 0..`total`.
        total: How many were judged; 0 gives `(0, 1)`, nothing is known.
        z: Normal quantile; the default gives 95 %.

    Returns:
        Lower and upper bound, 0..1; never of zero width.

    Raises:
        CvtrainError: Counts that contradict each other.
    """
    if not 0 <= correct <= total:
        raise CvtrainError(f"wilson: {correct} correct of {total} is impossible")
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    spread = z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    # Rounding must not push a bound past the point it belongs to at 0 and at all.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high


def paired_difference(only_a: int, only_b: int, total: int, z: float = Z_95) -> tuple[float, float, float]:
    """Return how much more accurate A is than B on the same samples, with its interval.

    The adjusted Wald interval of Bonett & Price, "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data", Journal of Educational and Behavioral Statistics 37, 2012. Samples that both
    get right or both get wrong cancel, so it is far narrower than two intervals side by side. Its centre is drawn
    towards zero, so a difference at the very edge of what is possible may lie outside.

    Args:
        only_a: Samples that A gets right and B wrong.
        only_b: Samples that B gets right and A wrong.
        total: All samples, 1 or more.
        z: Normal quantile; the default gives 95 %.

    Returns:
        `accuracy(A) - accuracy(B)` as measured, its lower and its upper bound, all in -1..1; never of zero width.

    Raises:
        CvtrainError: Counts that contradict each other.
    """
    _check_counts(only_a, only_b, total)
    share_a = (only_a + 1) / (total + 2)
    share_b = (only_b + 1) / (total + 2)
    centre = share_a - share_b
    half = z * math.sqrt((share_a + share_b - centre**2) / (total + 2))
    return (only_a - only_b) / total, max(-1.0, centre - half), min(1.0, centre + half)


def paired_bootstrap(only_a: int, only_b: int, total: int, draws: int = DRAWS) -> tuple[float, float, float]:
    """Return how much more accurate A is than B on the same samples, with its 95 % percentile bootstrap interval.

    Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. Samples drawn again with replacement
    are, as far as the difference goes, three counts drawn from a multinomial distribution: only A right, only B right,
    all others. Where every draw is the same, as when no sample tells A from B, the bootstrap knows nothing, and the
    interval is `paired_difference`'s.

    Args:
        only_a: Samples that A gets right and B wrong.
        only_b: Samples that B gets right and A wrong.
        total: All samples, 1 or more.
        draws: How often the samples are drawn again; a pure function of the counts.

    Returns:
        `accuracy(A) - accuracy(B)` as measured, its lower and its upper bound, all in -1..1; never of zero width.

    Raises:
        CvtrainError: Counts that contradict each other.
    """
    _check_counts(only_a, only_b, total)
    shares = [only_a / total, only_b / total, (total - only_a - only_b) / total]
    counts = generator("paired_bootstrap", only_a, only_b, total).multinomial(total, shares, draws)
    low, high = (float(bound) for bound in np.percentile((counts[:, 0] - counts[:, 1]) / total, (2.5, 97.5)))
    return ((only_a - only_b) / total, low, high) if low < high else paired_difference(only_a, only_b, total)


def _check_counts(only_a: int, only_b: int, total: int) -> None:
    if total < 1 or only_a < 0 or only_b < 0 or only_a + only_b > total:
        raise CvtrainError(f"paired difference: {only_a} and {only_b} of {total} samples are impossible")
