"""Size of a model on paper: parameters and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import flop_counter

from cvtrain.core.compiler import spare
from cvtrain.core.modes import evaluating


def count_params(model: nn.Module) -> int:
    """Return the number of parameters, frozen ones included and shared ones once; zeros count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Return the multiply-accumulates of one picture, in convolutions, matrix products and attention.

    Args:
        model: Any device and mode; left as it was.
        example: `(B, C, H, W)` float input; only the first picture is used.

    Returns:
        Half of what `torch.utils.flop_counter` counts, because it counts a multiply-accumulate as two operations.
    """
    first = next(model.parameters(), example)
    with counting(model), flop_counter.FlopCounterMode(display=False) as counter:
        spare(type(counter.mode))
        model(example[:1].to(device=first.device, dtype=first.dtype))
    return int(counter.get_total_flops()) // 2


@contextmanager
def counting(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation, without gradients and with attention as products that can be counted, for a while.

    Each module gets its mode back, and each parameter its gradient.
    """
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        for parameter in trains:  # the counter stumbles over a module that is given a token that trains
            parameter.requires_grad_(False)
        # The fused attention kernel of eval mode has no formula and would count as nothing.
        torch.backends.mha.set_fastpath_enabled(False)
        with evaluating(model), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for parameter in trains:
            parameter.requires_grad_(True)
