"""A run divided into phases; which one an epoch belongs to is a pure function of the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Epochs in which something stays the same.

    Attributes:
        name: For logs.
        first: First epoch, from 0.
        epochs: How many.
        lr: Base learning rate; None means the run's.
    """

    name: str
    first: int
    epochs: int
    lr: float | None = None


AnyPhase = TypeVar("AnyPhase", bound=Phase)


def phase_at(phases: Sequence[AnyPhase], epoch: int) -> AnyPhase:
    """Return the phase that `epoch` belongs to; the last one for epochs after the end."""
    return next((phase for phase in phases if epoch < phase.first + phase.epochs), phases[-1])
