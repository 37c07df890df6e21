"""Label smoothing."""

from __future__ import annotations

import torch
from torch import Tensor

from cvtrain.regularizer.base import Regularizer


class LabelSmoothing(Regularizer):
    """Mix the targets with the uniform distribution: 1-ε+ε/K on the target, ε/K elsewhere.

    Source: Szegedy et al., "Rethinking the Inception architecture", CVPR 2016.

    Args:
        label_smoothing: ε in 0..1.
    """

    def __init__(self, label_smoothing: float = 0.1) -> None:
        self.epsilon = label_smoothing

    def soften(self, targets: Tensor) -> Tensor:
        """Map `(B, K)` probabilities to smoothed ones."""
        uniform = torch.tensor(self.epsilon / targets.shape[1])
        return torch.add(uniform, targets, alpha=1.0 - self.epsilon)
