"""Cross entropy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class CrossEntropy:
    """Mean over the batch of `-Σ_k target_k · log softmax(logits)_k`."""

    def __call__(self, logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the scalar float32 loss.

        Args:
            logits: `(B, K)`.
            targets: `(B, K)` probabilities.
            weight: `(B,)` factor of each picture's loss; the mean stays one over pictures.
        """
        if weight is None:
            return F.cross_entropy(logits.float(), targets)
        return (weight * F.cross_entropy(logits.float(), targets, reduction="none")).mean()
