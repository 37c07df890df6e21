"""Focal losses: less weight for what the model already answers well."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Focal:
    """Mean over the batch of `-Σ_k target_k · (1 - p_k)^γ · log p_k`, p being the softmax of the logits.

    With whole targets it is the focal loss of Lin et al., "Focal loss for dense object detection", ICCV 2017, for many
    classes; mixed and smoothed targets count each of their classes by its share. γ = 0 is cross entropy.

    Args:
        focal_gamma: γ, 0 or more: how much less an easy picture counts.
    """

    def __init__(self, focal_gamma: float = 2.0) -> None:
        self.gamma = focal_gamma

    def __call__(self, logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the scalar float32 loss.

        Args:
            logits: `(B, K)`.
            targets: `(B, K)` probabilities.
            weight: `(B,)` factor of each picture's loss; the mean stays one over pictures.
        """
        log_p = F.log_softmax(logits.float(), dim=1)
        # Above zero: where 1 - p rounds to nothing, a γ below 1 would have an infinite slope.
        rest = (-torch.expm1(log_p)).clamp_min(torch.finfo(torch.float32).tiny)
        losses = -(targets * rest**self.gamma * log_p).sum(1)
        return (losses if weight is None else weight * losses).mean()


class FocalBinaryCrossEntropy:
    """Mean over batch and labels of `-t · (1 - p)^γ · log p - (1 - t) · p^γ · log(1 - p)`, p being σ(logit).

    Source: Lin et al., "Focal loss for dense object detection", ICCV 2017; for targets of 0 and 1 the same as
    torchvision.ops.sigmoid_focal_loss. That one gives a soft target's two terms one common factor, by which a target
    of 1/2 knows no easy answer; here each keeps its own. γ = 0 without α is binary cross entropy.

    Args:
        focal_gamma: γ, 0 or more: how much less an easy label counts.
        focal_alpha: α in 0..1, the weight of presence; absence gets 1 - α. None: both 1.
    """

    def __init__(self, focal_gamma: float = 2.0, focal_alpha: float | None = None) -> None:
        self.gamma, self.alpha = focal_gamma, focal_alpha

    def __call__(self, logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the scalar float32 loss.

        Args:
            logits: `(B, K)`.
            targets: `(B, K)` float in 0..1.
            weight: `(B, K)` factor of each label's loss; the mean stays one over all labels.
        """
        log_p, log_rest = F.logsigmoid(logits.float()), F.logsigmoid(-logits.float())
        present = targets * (self.gamma * log_rest).exp() * log_p
        absent = (1.0 - targets) * (self.gamma * log_p).exp() * log_rest
        if self.alpha is not None:
            present, absent = self.alpha * present, (1.0 - self.alpha) * absent
        losses = -(present + absent)
        return (losses if weight is None else weight * losses).mean()
