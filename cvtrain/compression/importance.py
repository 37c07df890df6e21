"""How much a network would miss each of its channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from cvtrain.compression.channels import ChannelGroup
from cvtrain.core.random import generator

ChannelImportance = Literal["magnitude", "bn_scale", "taylor", "random"]
CHANNEL_IMPORTANCES: tuple[ChannelImportance, ...] = get_args(ChannelImportance)

_Value = Callable[[nn.Parameter], Tensor]


def channel_scores(
    model: nn.Module, groups: Sequence[ChannelGroup], importance: ChannelImportance, seed: int
) -> list[Tensor]:
    """Return how important each group's channels are, 1 on average in every group, so that groups can be compared.

    `magnitude` is a channel's sum of squared weights over all layers of its group (Fang et al., "DepGraph", CVPR 2023);
    `taylor` that of (weight · gradient)², which estimates what the loss would gain by removing it (Molchanov et al.,
    "Importance estimation for neural network pruning", CVPR 2019); `bn_scale` the magnitude of batch norm's scales
    (Liu et al., "Learning efficient convolutional networks through network slimming", ICCV 2017), and `magnitude` for
    groups without batch norm; `random` is the baseline.

    Args:
        model: The network of the groups; with gradients where `importance` is `taylor`.
        groups: Of `channel_groups`.
        importance: See above.
        seed: Of `random`.

    Returns:
        For each group `(channels / blocks,)` float32 of at least 0, the mean over the group's blocks.
    """
    parameters = dict(model.named_parameters())
    norms = {path for path, module in model.named_modules() if isinstance(module, _NormBase)}
    weighted = {
        path
        for path, module in model.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear, _NormBase, nn.LayerNorm))
    }
    draws = generator(seed, "random channels")
    scores = []
    for group in groups:
        if importance == "random":
            score = torch.from_numpy(draws.random(group.channels)).float()
        else:
            score = torch.zeros(0)
            if importance == "bn_scale":
                score = _sum(group, parameters, norms, torch.abs)
            if not len(score):
                score = _sum(group, parameters, weighted, _taylor if importance == "taylor" else torch.square)
        score = score.view(group.blocks, -1).mean(0)
        scores.append(score / score.mean().clamp_min(torch.finfo(torch.float32).tiny))
    return scores


def _taylor(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:  # the loss does not depend on it
        return torch.zeros_like(parameter)
    return (parameter * parameter.grad).square()


@torch.no_grad()
def _sum(group: ChannelGroup, parameters: dict[str, nn.Parameter], layers: set[str], value: _Value) -> Tensor:
    """Return `(channels,)`: the values of the weights of `layers`, added up a channel; `(0,)` where there is none."""
    total, found = torch.zeros(group.channels), False
    for cut in group.cuts:
        path, _, own = cut.tensor.rpartition(".")
        if own == "weight" and path in layers:
            weight = value(parameters[cut.tensor]).float().cpu()
            a_place = weight.transpose(0, cut.dim).flatten(1).sum(1) if weight.dim() > 1 else weight
            total.scatter_add_(0, cut.channels, a_place[cut.places])
            found = True
    return total if found else torch.zeros(0)
