"""What a regularizer may change: the model once, the targets at every step."""

from __future__ import annotations

from torch import Tensor, nn


class Regularizer:
    """A regularizer that changes nothing; subclasses override what they need."""

    def attach(self, model: nn.Module) -> None:
        """Change `model` in place, once, before training."""

    def soften(self, targets: Tensor) -> Tensor:
        """Map training targets `(B, K)` float to the same shape."""
        return targets
