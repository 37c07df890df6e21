"""Cross entropy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class CrossEntropy:
    """Mean over the batch of `-Σ_k weight_k · target_k · log softmax(logits)_k`.

    The mean is over pictures, not over Σ weight as in `torch.nn.CrossEntropyLoss(weight=…)`: so accumulated
    micro-batches stay equal to the large batch, and a batch of one class keeps its weight. Over a whole training set
    the two agree, since `class_weights` makes Σ weight the number of pictures.

    Args:
        weight: `(K,)` float32 weight of each class, on the logits' device; None: all 1.
    """

    def __init__(self, weight: Tensor | None = None) -> None:
        self.weight = weight

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar float32 loss of logits `(B, K)` against probabilities `(B, K)`."""
        return F.cross_entropy(logits.float(), targets, weight=self.weight)
