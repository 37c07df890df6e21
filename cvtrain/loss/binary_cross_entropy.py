"""Binary cross entropy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class BinaryCrossEntropy:
    """Mean over batch and labels of `-weight_k · t · log σ(x) - (1 - t) · log(1 - σ(x))`.

    Args:
        weight: `(K,)` float32 weight of the pictures that have a label against those that have not, on the logits'
            device; None: all 1.
    """

    def __init__(self, weight: Tensor | None = None) -> None:
        self.weight = weight

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar float32 loss of logits `(B, K)` against targets `(B, K)` float in 0..1."""
        return F.binary_cross_entropy_with_logits(logits.float(), targets, pos_weight=self.weight)
