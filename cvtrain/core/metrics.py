"""Metrics of a split, accumulated on the device; nothing is copied to the host before they are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


class ClassificationMetrics:
    """Accumulates loss, top-5 and the confusion matrix over batches.

    Args:
        num_classes: K.
        device: Where the predictions are.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.loss_sum = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        self.top5 = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch of logits `(B, K)` and class numbers `(B,)` int64."""
        logits = logits.float()
        self.loss_sum += F.cross_entropy(logits, labels, reduction="sum")
        cells = labels * self.num_classes + logits.argmax(1)
        self.confusion += torch.bincount(cells, minlength=self.num_classes**2).view_as(self.confusion)
        if self.num_classes > 5:
            self.top5 += (logits.topk(5, dim=1).indices == labels[:, None]).sum()

    def matrix(self) -> NDArray[np.int64]:
        """Return the confusion matrix `(K, K)`: rows are true classes, columns predicted ones."""
        counts: NDArray[np.int64] = self.confusion.cpu().numpy()
        return counts

    def right(self) -> tuple[int, int]:
        """Return how many pictures were answered right, and how many there are."""
        matrix = self.matrix()
        return int(np.trace(matrix)), int(matrix.sum())

    def by_class(self) -> dict[str, NDArray[Any]]:
        """Return `support`, `hits` (both int64), `precision`, `recall` and `f1` (0..1) of each class, all `(K,)`."""
        matrix = self.matrix()
        return {"support": matrix.sum(1), "hits": np.diag(matrix), **per_class(matrix)}

    def compute(self) -> dict[str, float]:
        """Return `loss`, `acc`, `balanced_acc`, `f1` (macro) and, above five classes, `top5`, all but loss in 0..1."""
        matrix = self.matrix()
        total = max(1, int(matrix.sum()))
        table = per_class(matrix)
        present = matrix.sum(1) > 0
        values = {
            "loss": float(self.loss_sum) / total,
            "acc": float(np.trace(matrix)) / total,
            "balanced_acc": float(table["recall"][present].mean()) if present.any() else 0.0,
            "f1": float(table["f1"][present].mean()) if present.any() else 0.0,
        }
        if self.num_classes > 5:
            values["top5"] = float(self.top5) / total
        return values


class MultilabelMetrics:
    """Accumulates the answers of a model that decides on every label of a picture by itself.

    A label is given where its logit is 0 or more, a probability of 0.5 or more.

    Args:
        num_classes: K.
        device: Where the predictions are.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        # Average precision needs every score, not only their sums.
        self._logits = [torch.zeros(0, num_classes, device=device)]
        self._labels = [torch.zeros(0, num_classes, dtype=torch.bool, device=device)]

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch of logits `(B, K)` and labels `(B, K)` of 0 and 1."""
        self._logits.append(logits.float())
        self._labels.append(labels.bool())

    def right(self) -> tuple[int, int]:
        """Return on how many pictures every label is right, and how many there are."""
        logits, labels = self._gathered()
        return int(((logits >= 0) == labels).all(1).sum()), len(labels)

    def by_class(self) -> dict[str, NDArray[Any]]:
        """Return the table of each class.

        Returns:
            `(K,)` arrays: `support` and `hits` (int64: pictures that have the label, and those of them that were given
            it), `precision`, `recall`, `f1` and `average_precision` (0..1; 0 where a class was never there).
        """
        logits, labels = self._gathered()
        given = logits >= 0
        hits, predicted, support = ((x.sum(0)).numpy() for x in (given & labels, given, labels))
        return {
            "support": support,
            "hits": hits,
            **rates(hits, predicted, support),
            "average_precision": average_precision(logits, labels),
        }

    def compute(self) -> dict[str, float]:
        """Return the values of the split.

        Returns:
            `loss` (binary cross entropy, mean over pictures and labels), `acc` (exact match: every label right), `map`
            and `f1` (means over the classes that were there), `f1_micro` and `hamming` (share of label decisions that
            are wrong); all but `loss` in 0..1, as scikit-learn defines them.
        """
        logits, labels = self._gathered()
        table = self.by_class()
        present = table["support"] > 0
        right, total = self.right()
        given = logits >= 0
        found, wanted = int(given.sum()), int(labels.sum())
        loss = F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="sum")
        return {
            "loss": float(loss) / max(1, labels.numel()),
            "acc": right / max(1, total),
            "map": float(table["average_precision"][present].mean()) if present.any() else 0.0,
            "f1": float(table["f1"][present].mean()) if present.any() else 0.0,
            "f1_micro": 2 * int(table["hits"].sum()) / max(1, found + wanted),
            "hamming": int((given != labels).sum()) / max(1, labels.numel()),
        }

    def _gathered(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self._logits).cpu(), torch.cat(self._labels).cpu()


def measured(logits: Tensor, labels: Tensor) -> ClassificationMetrics | MultilabelMetrics:
    """Return the metrics of logits `(N, K)` with labels `(N,)` of class numbers, or `(N, K)` of 0 and 1."""
    metrics: ClassificationMetrics | MultilabelMetrics
    if labels.ndim == 2:
        metrics = MultilabelMetrics(logits.shape[1], logits.device)
    else:
        metrics = ClassificationMetrics(logits.shape[1], logits.device)
    metrics.update(logits, labels)
    return metrics


def average_precision(scores: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """Return the average precision of each class: Σ over thresholds of (recall gained) · precision.

    Equal scores are one threshold, as in scikit-learn; nothing is interpolated.

    Args:
        scores: `(N, K)` float on the CPU, higher for likelier.
        labels: `(N, K)` bool.

    Returns:
        `(K,)` in 0..1; 0 where a class was never there.
    """
    falling, order = scores.T.contiguous().neg().sort(dim=1)
    hit = labels.T.gather(1, order).double()
    # At the end of a run of equal scores all of them have been taken.
    taken = torch.searchsorted(falling, falling, right=True).clamp(1, max(1, len(scores)))
    precision = hit.cumsum(1).gather(1, taken - 1) / taken
    values: NDArray[np.float64] = ((precision * hit).sum(1) / hit.sum(1).clamp(min=1)).numpy()
    return values


def class_counts(labels: NDArray[Any], num_classes: int) -> NDArray[np.int64]:
    """Return how many pictures have each class, `(K,)`, of labels `(N,)` in 0..K-1, or `(N, K)` of 0 and 1."""
    counts: NDArray[np.int64] = (
        labels.sum(0, dtype=np.int64) if labels.ndim == 2 else np.bincount(labels, minlength=num_classes)
    )
    return counts


def per_class(matrix: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Return `precision`, `recall` and `f1` of each class, `(K,)` in 0..1; 0 where a class was never there."""
    return rates(np.diag(matrix), matrix.sum(0), matrix.sum(1))


def rates(hits: NDArray[Any], predicted: NDArray[Any], support: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Return `precision`, `recall` and `f1` of counts of one shape: answers that are right, given, and wanted."""
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(support, 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {"precision": precision, "recall": recall, "f1": f1}
