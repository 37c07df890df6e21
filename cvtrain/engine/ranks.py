"""Where several processes must do the same at the same step: stopping, and the batches of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

import torch
from torch import nn

from cvtrain.core import distributed
from cvtrain.engine.signals import StopRequest, interrupted

Item = TypeVar("Item")


class SharedStop(StopRequest):
    """A request that reaches one process and counts when all know of it, so that they stop after the same step.

    They talk about it at every step, over the network and never by way of an accelerator, which nobody waits for.
    """

    _agreed = 0
    _save_agreed = False
    _save_asked = False

    @property
    def requested(self) -> bool:
        """Return whether all have heard that one is to stop."""
        return self._agreed != 0

    @property
    def save_now(self) -> bool:
        """Return whether all have heard that one is to save."""
        return self._save_agreed

    @save_now.setter
    def save_now(self, wanted: bool) -> None:
        self._save_agreed = self._save_asked = wanted

    def check(self) -> None:
        """Leave when all have heard of a signal; call this right after a save.

        Raises:
            Interrupted: With exit code 130 or 143, in every process.
        """
        if self._agreed:
            raise interrupted(self._agreed, "the checkpoint is written")

    def exchange(self, more: bool = False) -> bool:
        """Hear of requests; return whether `more` is true anywhere."""
        mine = torch.tensor([float(more), float(self._signal or 0), float(self._save_asked)])
        any_more, number, save = distributed.largest(mine).tolist()
        self._agreed = int(number)
        if self._agreed:
            distributed.expect_end()
        self._save_agreed = bool(save)
        return bool(any_more)

    def _save(self, number: int, frame: FrameType | None) -> None:
        self._save_asked = True


def in_step(stop: StopRequest, items: Iterable[Item]) -> Iterator[Item | None]:
    """Yield `items`, then None until the last process has no more of its own, so that all hear of a request at once."""
    iterator = iter(items)
    while True:
        item = next(iterator, None)
        if not stop.exchange(more=item is not None):
            return
        yield item


def average_buffers(model: nn.Module) -> None:
    """Give all processes the means of their batch norms' statistics, so that they evaluate and save the same.

    What is not in training mode has not changed, and the mean of three equal numbers is not always the same number.
    """
    if distributed.world_size() > 1:
        training = [buffer for m in model.modules() if m.training for buffer in m.buffers(recurse=False)]
        distributed.average([buffer for buffer in training if buffer.is_floating_point()])
