"""Cross entropy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class CrossEntropy:
    """Mean over the batch of `-Σ_k target_k · log softmax(logits)_k`."""

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar float32 loss of logits `(B, K)` against probabilities `(B, K)`."""
        return F.cross_entropy(logits.float(), targets)
