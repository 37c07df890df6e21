"""Binary cross entropy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class BinaryCrossEntropy:
    """Mean over batch and labels of `-t · log σ(x) - (1 - t) · log(1 - σ(x))`."""

    def __call__(self, logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the scalar float32 loss.

        Args:
            logits: `(B, K)`.
            targets: `(B, K)` float in 0..1.
            weight: `(B, K)` factor of each label's loss; the mean stays one over all labels.
        """
        return F.binary_cross_entropy_with_logits(logits.float(), targets, weight=weight)
