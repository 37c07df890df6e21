"""Size of a model on paper: parameters and multiply-accumulates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


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
    modes = [(module, module.training) for module in model.modules()]
    first = next(model.parameters(), example)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    counter = FlopCounterMode(display=False)
    try:
        model.eval()
        # The fused attention kernel of eval mode has no formula and would count as nothing.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), counter:
            model(example[:1].to(device=first.device, dtype=first.dtype))
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in modes:
            module.training = training
    return int(counter.get_total_flops()) // 2
