"""Where several processes must do the same at the same step: stopping, and the batches of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

import torch
from torch import Tensor, nn

from cvtrain.core import distributed
from cvtrain.engine.signals import StopRequest, _interrupted

Item = TypeVar("Item")


class SharedStop(StopRequest):
    """A request that reaches one process and counts when all know of it, so that they stop after the same step.

    On a CPU they agree at every step; on an accelerator, which nobody wants to wait for, at every log.
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
            raise _interrupted(self._agreed, "the checkpoint is written")

    def agree(self, flag: Tensor) -> Tensor:
        """Return the largest `flag`, a scalar on the device, of all processes; on a CPU they also hear of requests."""
        if flag.device.type != "cpu":
            return distributed.largest(flag.clone())
        agreed, *requests = distributed.largest(torch.tensor([float(flag), *self._requests()])).tolist()
        self._hear(*requests)
        return flag.new_tensor(agreed)

    def exchange(self, more: bool = False) -> bool:
        """Hear of requests; return whether `more` is true anywhere."""
        any_more, *requests = distributed.largest(torch.tensor([float(more), *self._requests()])).tolist()
        self._hear(*requests)
        return bool(any_more)

    def _requests(self) -> tuple[float, float]:
        return float(self._signal or 0), float(self._save_asked)

    def _hear(self, number: float, save: float) -> None:
        self._agreed = int(number)
        if self._agreed:
            distributed.expect_end()
        self._save_agreed = bool(save)

    def _save(self, number: int, frame: FrameType | None) -> None:
        self._save_asked = True


def make_stop(stop: type[StopRequest] = StopRequest) -> type[StopRequest]:
    """Return the kind of stop request that this run needs."""
    return SharedStop if distributed.world_size() > 1 else stop


def in_step(stop: StopRequest, items: Iterable[Item]) -> Iterator[Item]:
    """Yield `items`, and stay with the other processes until the last has no more of its own."""
    if not isinstance(stop, SharedStop):
        yield from items
        return
    iterator = iter(items)
    while True:
        item = next(iterator, None)
        if not stop.exchange(more=item is not None):
            return
        if item is not None:
            yield item


def average_buffers(model: nn.Module) -> None:
    """Give all processes the means of their batch norms' statistics, so that they evaluate and save the same."""
    if distributed.world_size() > 1:
        distributed.average([buffer for buffer in model.buffers() if buffer.is_floating_point()])
