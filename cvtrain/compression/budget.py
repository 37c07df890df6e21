"""How many channels each group keeps, for a share to remove or a budget to stay within."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvtrain.compression.channels import ChannelGroup, fewest, in_blocks, remove_channels, step_of

FINEST = 1 / 256
"""Share of the channels to which a budget is met."""
_LATENCY_RUNS = 15
LATENCY_FINEST = 1 / 32
"""Coarser, as a latency is not known better than that."""


@dataclass(frozen=True)
class Chooser:
    """Chooses the channels to remove, the least important first.

    Attributes:
        groups: Of the network as it is.
        scores: Importance, `(channels / blocks,)` for each group, as `channel_scores` returns them.
        dense: Channels that each group had before any were removed, by its layer.
        round_to: What remains of a group is the nearest multiple of it, and never less unless it had fewer.
        global_pruning: Whether groups compete; otherwise each loses the same share.
    """

    groups: Sequence[ChannelGroup]
    scores: Sequence[Tensor]
    dense: Mapping[str, int]
    round_to: int
    global_pruning: bool

    def doomed(self, ratio: float) -> list[Tensor]:
        """Return for each group the channels (int64) to remove so that about `ratio` (0..1) of `dense` are gone."""
        if self.global_pruning:
            wanted = (1 - ratio) * sum(self.dense[group.layer] for group in self.groups)
            kept = _kept_globally(self.groups, self.scores, wanted)
        else:
            kept = [(1 - ratio) * self.dense[group.layer] / group.blocks for group in self.groups]
        doomed = []
        for group, score, count in zip(self.groups, self.scores, kept, strict=True):
            step = step_of(group, self.round_to)
            rounded = max(fewest(group, self.round_to), int(count / step + 0.5) * step)
            least_first = score.argsort(stable=True)
            doomed.append(in_blocks(group, least_first[: max(0, len(score) - rounded)].sort().values))
        return doomed

    def prune(self, model: nn.Module, ratio: float) -> nn.Module:
        """Return a copy of `model`, any device, without those channels."""
        pruned = copy.deepcopy(model)
        remove_channels(pruned, self.groups, self.doomed(ratio))
        return pruned


def _kept_globally(groups: Sequence[ChannelGroup], scores: Sequence[Tensor], wanted: float) -> list[float]:
    """Return how many channels a block of each group keeps if the `wanted` most important of all are kept."""
    everything = torch.cat(list(scores))
    sizes = torch.cat([torch.full_like(score, group.blocks) for group, score in zip(groups, scores, strict=True)])
    order = everything.argsort(descending=True, stable=True)
    count = int((sizes[order].double().cumsum(0) <= wanted + 1e-6).sum())
    chosen = torch.zeros(len(everything), dtype=torch.bool)
    chosen[order[:count]] = True
    return [float(part.sum()) for part in torch.split(chosen, [len(score) for score in scores])]


def ratio_within(cost: Callable[[float], float], budget: float, finest: float = FINEST) -> float | None:
    """Return about the smallest ratio at which `cost` is at most `budget`; None where none is enough.

    Args:
        cost: Of a ratio of channels removed, 0..1; it falls as that grows.
        budget: What may be left.
        finest: How exactly the ratio is sought.
    """
    if cost(0.0) <= budget:
        return 0.0
    if cost(1.0) > budget:
        return None
    low, high = 0.0, 1.0
    while high - low > finest:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= budget else (middle, high)
    return high


def relative_latency(model: nn.Module, dense: nn.Module, example: Tensor) -> float:
    """Return the milliseconds of one picture through `model` by those through `dense`, in eager PyTorch, in turn.

    Args:
        model: On the CPU, in eval mode.
        dense: The same.
        example: `(1, C, H, W)` float32.

    Returns:
        The median of the ratios of neighbouring runs, so that a slow moment of the machine hits both.
    """
    with torch.inference_mode():
        for _ in range(3):
            model(example), dense(example)
        times = [_seconds(network, example) for _ in range(_LATENCY_RUNS) for network in (model, dense)]
    return statistics.median(one / other for one, other in zip(times[::2], times[1::2], strict=True))


def _seconds(model: nn.Module, example: Tensor) -> float:
    model(example)  # fetches its weights back into the cache from which the other pushed them
    start = time.perf_counter()
    model(example)
    return time.perf_counter() - start
