"""Knowledge distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cvtrain.distillation.teacher import Teacher


class NoDistillation:
    """The task's own objective."""

    terms: tuple[str, ...] = ()
    """Names of the terms that it adds."""
    teacher_sha256: str | None = None
    """SHA-256 of the teacher's weights file in hex; None without a teacher."""

    def __call__(self, losses: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """Return `losses` as they are."""
        return losses


class KnowledgeDistillation(NoDistillation):
    """`(1 - α) · task loss + α · T² · KL(teacher at T ‖ student at T)`, the mean over the batch.

    A model's answer at temperature T is the softmax of its logits over T. Where a picture may have several labels it
    is the sigmoid, every label being a distribution over absent and present, and the mean is over labels as well, as
    that of the binary cross entropy is. T² keeps the gradient's size when T changes.

    The teacher sees what the student sees, the same augmented and mixed pictures (Beyer et al., "Knowledge
    distillation: a good teacher is patient and consistent", CVPR 2022).

    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015.

    Args:
        teacher: Maps the student's pictures to logits in the order of the student's classes.
        multilabel: Whether a picture may have several labels.
        temperature: T, above 0.
        teacher_weight: α in 0..1.
    """

    terms: tuple[str, ...] = ("task", "distillation")

    def __init__(
        self, teacher: Teacher, multilabel: bool = False, temperature: float = 4.0, teacher_weight: float = 0.7
    ) -> None:
        self.teacher = teacher
        self.multilabel = multilabel
        self.temperature = temperature
        self.teacher_weight = teacher_weight
        self.teacher_sha256 = teacher.sha256

    def __call__(self, losses: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """Return the task's terms with the teacher's part in `loss`.

        Args:
            losses: `loss`, a scalar, and `logits` `(B, K)` of the student, among others.
            images: `(B, C, H, W)` float32, normalised: those that the student answered.

        Returns:
            `losses` with another `loss`, and detached scalars `task` and `distillation`: the task's own loss and
            T²·KL, before they are weighted.
        """
        divergence = self._divergence(losses["logits"].float(), self.teacher(images).float())
        share = self.teacher_weight
        return {
            **losses,
            "loss": (1 - share) * losses["loss"] + share * divergence,
            "task": losses["loss"].detach(),
            "distillation": divergence.detach(),
        }

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = (self._log_probabilities(logits / self.temperature) for logits in (student, teacher))
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean() * self.temperature**2

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        """Map `(B, K)` to log probabilities whose last dimension is a distribution: `(B, K)`, or `(B, K, 2)`."""
        if self.multilabel:
            return torch.stack((F.logsigmoid(logits), F.logsigmoid(-logits)), dim=-1)
        return F.log_softmax(logits, dim=-1)
