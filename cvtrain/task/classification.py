"""Single-label classification."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvtrain.core.metrics import ClassificationMetrics
from cvtrain.regularizer.base import Regularizer


class Classification:
    """One class a picture.

    Args:
        loss: Maps logits `(B, K)` and probabilities `(B, K)` to a scalar.
        regularizers: Soften the training targets, in order.
        num_classes: K.
    """

    multilabel = False

    def __init__(
        self, loss: Callable[[Tensor, Tensor], Tensor], regularizers: Sequence[Regularizer], num_classes: int
    ) -> None:
        self.loss = loss
        self.regularizers = list(regularizers)
        self.num_classes = num_classes

    def encode(self, targets: Tensor) -> Tensor:
        """Turn class numbers `(B,)` int64 into probabilities `(B, K)` float32, what mixing works on."""
        return F.one_hot(targets, self.num_classes).float()

    def decide(self, logits: Tensor) -> Tensor:
        """Turn logits `(B, K)` into class numbers `(B,)` int64."""
        return logits.argmax(1)

    def losses(self, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the terms of the training objective.

        Args:
            model: The network.
            images: `(B, C, H, W)` float32, normalised.
            targets: `(B, K)` probabilities, mixed but not smoothed.

        Returns:
            `loss`: scalar to minimise. `acc`: detached accuracy, each picture's score being the probability
            that its target gives to the predicted class, so that a mixed picture counts by λ.
        """
        logits = model(images)
        softened = targets
        for regularizer in self.regularizers:
            softened = regularizer.soften(softened)
        with torch.no_grad():
            acc = targets.gather(1, logits.argmax(1, keepdim=True)).mean()
        return {"loss": self.loss(logits, softened), "acc": acc}

    def metrics(self, device: torch.device) -> ClassificationMetrics:
        """Return an empty accumulator for evaluation."""
        return ClassificationMetrics(self.num_classes, device)
