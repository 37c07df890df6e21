"""Which answers are worst, and which classes are taken for which."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Confusion:
    """Pictures of one class that were taken for another.

    Attributes:
        true: Number of their class.
        predicted: Number of the other class.
        support: Pictures of the true class.
        positions: `(n,)` of the pictures, the most confident answer first.
    """

    true: int
    predicted: int
    support: int
    positions: NDArray[np.int64]


def worst_first(correct: NDArray[np.bool_], confidence: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return positions `(N,)`: wrong answers, the most confident first, then right ones, the least confident first.

    Args:
        correct: `(N,)`.
        confidence: `(N,)` in 0..1.
    """
    order: NDArray[np.int64] = np.lexsort((np.where(correct, confidence, -confidence), correct)).astype(np.int64)
    return order


def confused_pairs(
    labels: NDArray[np.int64], decided: NDArray[np.int64], confidence: NDArray[np.float32]
) -> list[Confusion]:
    """Return who is taken for whom, the most frequent first; equals in the order of the classes.

    Args:
        labels: `(N,)` class numbers.
        decided: `(N,)` class numbers, the answers.
        confidence: `(N,)` of the answers, in 0..1.
    """
    wrong = np.flatnonzero(labels != decided)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    pairs: dict[tuple[int, int], list[int]] = {}
    for position in wrong.tolist():
        pairs.setdefault((int(labels[position]), int(decided[position])), []).append(position)
    ordered = sorted(pairs.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        Confusion(true, predicted, int((labels == true).sum()), np.array(positions, np.int64))
        for (true, predicted), positions in ordered
    ]
