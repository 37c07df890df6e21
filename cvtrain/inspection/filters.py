"""What the first layer looks for: its filters as pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvtrain.core.anatomy import first_convolution
from cvtrain.errors import ConfigError


def first_filters(model: nn.Module, shape: tuple[int, int, int]) -> tuple[str, Tensor]:
    """Return the path of the first convolution that runs, and its filters, float32 `(O, I, h, w)` on the CPU.

    Args:
        model: A network.
        shape: Channels, height and width that it takes.

    Raises:
        ConfigError: The network has no 2-D convolution, or cannot be followed.
    """
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise ConfigError(f"what=filters: {type(model).__name__} has no 2-D convolution, so no filters to show.")
    path, convolution = first_convolution(model, shape)
    return path, convolution.weight.detach().float().cpu()


def strongest(filters: Tensor, count: int) -> Tensor:
    """Return `(n,)`, the numbers of at most `count` of the filters `(O, I, h, w)` with the largest norms, ascending."""
    norms = filters.flatten(1).norm(dim=1)
    return torch.sort(norms.topk(min(count, len(norms))).indices).values


def scaled(filters: Tensor) -> Tensor:
    """Return filters `(O, I, h, w)` in 0..1, each by its own largest magnitude; 0 becomes 0.5."""
    largest = filters.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(filters.dtype).tiny)
    return 0.5 + filters / largest / 2
