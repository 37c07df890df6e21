"""Classification metrics from one confusion matrix; nothing is copied to the host before `compute`."""

from __future__ import annotations

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


def per_class(matrix: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Return `precision`, `recall` and `f1` of each class, `(K,)` in 0..1; 0 where a class was never there."""
    hits = np.diag(matrix).astype(np.float64)
    precision = hits / np.maximum(matrix.sum(0), 1)
    recall = hits / np.maximum(matrix.sum(1), 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {"precision": precision, "recall": recall, "f1": f1}
