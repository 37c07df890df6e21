"""Null objects for a fit inside another run: fine-tuning between compression steps."""

from __future__ import annotations

from pathlib import Path

from cvtrain.engine.checkpoint import CheckpointStore
from cvtrain.engine.run import TrainRun


class NoCheckpoints(CheckpointStore):
    """Saves nothing: the outer run's checkpoints stand."""

    def __init__(self) -> None:
        super().__init__(Path(), {})

    def save(self, run: TrainRun, best: bool) -> None:
        """Do nothing."""


class Silent:
    """Shows nothing."""

    def begin(self, epochs: int, steps_per_epoch: int, step: int) -> None:
        """Do nothing."""

    def step(self, run: TrainRun) -> None:
        """Do nothing."""

    def end_epoch(self, run: TrainRun, row: dict[str, float], improved: bool) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""
