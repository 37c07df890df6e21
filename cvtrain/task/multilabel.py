"""Multi-label classification."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cvtrain.core.metrics import MultilabelMetrics
from cvtrain.regularizer.base import Regularizer
from cvtrain.task.targets import prepared


class Multilabel:
    """Any number of classes a picture, each decided by itself.

    Args:
        loss: Maps logits `(B, K)` and targets `(B, K)` in 0..1, and with class weights a weight `(B, K)`, to a scalar.
        regularizers: Soften the training targets, in order.
        num_classes: K.
        class_weights: `(K, 2)` float32 above 0 on the run's device, for the absence and the presence of each label;
            None: all 1.
    """

    multilabel = True

    def __init__(
        self,
        loss: Callable[..., Tensor],
        regularizers: Sequence[Regularizer],
        num_classes: int,
        class_weights: Tensor | None = None,
    ) -> None:
        self.loss = loss
        self.regularizers = list(regularizers)
        self.num_classes = num_classes
        self.class_weights = class_weights

    def encode(self, targets: Tensor) -> Tensor:
        """Turn labels `(B, K)` of 0 and 1 into float32, what mixing works on."""
        return targets.float()

    def decide(self, logits: Tensor) -> Tensor:
        """Turn logits `(B, K)` into labels `(B, K)` uint8: 1 where the probability is 0.5 or more."""
        return (logits >= 0).to(torch.uint8)

    def losses(self, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the terms of the training objective.

        Args:
            model: The network.
            images: `(B, C, H, W)` float32, normalised.
            targets: `(B, K)` in 0..1, mixed but not smoothed.

        Returns:
            `loss`: scalar to minimise. `acc`: detached share of pictures with every label right; of a mixed picture
            those labels count that have half of it or more.
        """
        logits = model(images)
        with torch.no_grad():
            acc = (self.decide(logits) == (targets >= 0.5)).all(1).float().mean()
        # Every label is a distribution of its own over absent and present; smoothing gives ε/2 and 1 - ε/2.
        pairs = torch.stack((1.0 - targets, targets), dim=-1)
        softened, weight = prepared(pairs, self.class_weights, self.regularizers)
        present = softened[..., 1]
        loss = self.loss(logits, present) if weight is None else self.loss(logits, present, weight)
        return {"loss": loss, "acc": acc, "logits": logits}

    def metrics(self, device: torch.device) -> MultilabelMetrics:
        """Return an empty accumulator for evaluation."""
        return MultilabelMetrics(self.num_classes, device)
