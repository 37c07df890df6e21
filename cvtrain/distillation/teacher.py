"""A trained model that teaches another one, which may see other pictures and count its classes differently."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvtrain.core.types import Preprocess
from cvtrain.errors import ConfigError

log = logging.getLogger("cvtrain")


class Teacher:
    """Answers for the student's pictures, in the order of the student's classes.

    Pictures that were normalised by the student's mean and standard deviation are normalised by the teacher's, which
    is exact up to rounding; pictures of another size are resized.

    Args:
        model: The teacher on the run's device; it is frozen and set to eval mode.
        class_names: Its K classes in the order of its outputs.
        preprocess: How its pictures were made.
        student_names: The student's K classes in the order of its outputs.
        student_preprocess: How the student's pictures are made.
        sha256: Of its weights file, in hex.

    Raises:
        ConfigError: The two have other classes or other channels.
    """

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        preprocess: Preprocess,
        student_names: Sequence[str],
        student_preprocess: Preprocess,
        sha256: str,
    ) -> None:
        _check_classes(class_names, student_names)
        if preprocess.channels != student_preprocess.channels:
            raise ConfigError(
                f"distillation.teacher sees {preprocess.channels} channels, this run {student_preprocess.channels}\n"
                "  choose a teacher trained on pictures of the same kind, or set the data set's channels to the "
                "teacher's"
            )
        self.model = model.eval().requires_grad_(False)
        self.sha256 = sha256
        self.img_size = preprocess.img_size
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        places = [class_names.index(name) for name in student_names]
        self._order = None if places == list(range(len(places))) else torch.tensor(places, device=device)
        self._affine = _affine(student_preprocess, preprocess, device)
        self._tell(preprocess, student_preprocess)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Map the student's `(B, C, H, W)` float32, normalised, to logits `(B, K)`; no gradient flows back."""
        if self._affine is not None:
            scale, shift = self._affine
            images = images * scale + shift
        if images.shape[-2:] != (self.img_size, self.img_size):
            size = (self.img_size, self.img_size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        logits: Tensor = self.model(images)
        return logits if self._order is None else logits[:, self._order]

    def _tell(self, own: Preprocess, student: Preprocess) -> None:
        changes = []
        if self._order is not None:
            changes.append("its classes are put into this run's order")
        if self._affine is not None:
            changes.append("pictures are normalised anew for it")
        if own.img_size != student.img_size:
            changes.append(f"pictures are resized for it from {student.img_size} to {own.img_size} pixels")
        if changes:
            log.info("distillation: the teacher was trained otherwise: %s", "; ".join(changes))


def _check_classes(teacher: Sequence[str], student: Sequence[str]) -> None:
    if sorted(teacher) == sorted(student):
        return
    unknown = [name for name in student if name not in teacher]
    spare = [name for name in teacher if name not in student]
    both = ((unknown, "unknown to it"), (spare, "of its own"))
    parts = [f"{len(names)} {what} ({_some(names)})" for names, what in both if names]
    raise ConfigError(
        f"distillation.teacher has {len(teacher)} classes, this run {len(student)}: {' and '.join(parts)}\n"
        "  choose a teacher of the same classes; they may be in another order"
    )


def _some(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(map(repr, names[:shown])) + (", …" if len(names) > shown else "")


def _affine(given: Preprocess, wanted: Preprocess, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift, `(1, C, 1, 1)` float32, from one normalisation to the other; None when they are equal."""
    if (given.mean, given.std) == (wanted.mean, wanted.std):
        return None
    mean, std, own_mean, own_std = (
        torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
        for values in (given.mean, given.std, wanted.mean, wanted.std)
    )
    return (std / own_std).float().to(device), ((mean - own_mean) / own_std).float().to(device)
