"""Single-label classification."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cvtrain.core.metrics import ClassificationMetrics
from cvtrain.regularizer.base import Regularizer
from cvtrain.task.targets import prepared


class Classification:
    """One class a picture.

    The loss is a mean over pictures also with class weights, where `torch.nn.CrossEntropyLoss(weight=…)` divides by
    their sum: so accumulated micro-batches equal the large batch, and a batch of one class keeps its weight. Over a
    whole training set the two agree, since the weights of its pictures have a mean of 1.

    Args:
        loss: Maps logits `(B, K)` and probabilities `(B, K)`, and with class weights a weight `(B,)`, to a scalar.
        regularizers: Soften the training targets, in order.
        num_classes: K.
        class_weights: `(K,)` float32 above 0 on the run's device; None: all 1.
    """

    multilabel = False

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
        """Turn class numbers `(B,)` int64 into probabilities `(B, K)` float32, what mixing works on."""
        # one_hot would look for the smallest and the largest number, and wait for the device.
        zeros = torch.zeros((len(targets), self.num_classes), device=targets.device)
        return zeros.scatter_(1, targets.unsqueeze(1), 1.0)

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
        with torch.no_grad():
            acc = targets.gather(1, logits.argmax(1, keepdim=True)).mean()
        softened, weight = prepared(targets, self.class_weights, self.regularizers)
        loss = self.loss(logits, softened) if weight is None else self.loss(logits, softened, weight)
        return {"loss": loss, "acc": acc, "logits": logits}

    def metrics(self, device: torch.device) -> ClassificationMetrics:
        """Return an empty accumulator for evaluation."""
        return ClassificationMetrics(self.num_classes, device)
