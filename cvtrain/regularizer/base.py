"""What a regularizer may change: the model once, the targets at every step."""

from __future__ import annotations

from torch import Tensor, nn


class Regularizer:
    """A regularizer that changes nothing; subclasses override what they need."""

    def attach(self, model: nn.Module, shape: tuple[int, int, int] | None = None) -> None:
        """Change `model` in place, once, before training; its parameters keep their names.

        Args:
            model: The network that trains.
            shape: Channels, height and width that it takes, in pixels; None: tried.
        """

    def soften(self, targets: Tensor) -> Tensor:
        """Map training targets `(B, K)` float to the same shape."""
        return targets
