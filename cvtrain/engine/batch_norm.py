"""Batch norm's running statistics, measured anew."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def remeasure(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of each batch norm in training mode to their means over `batches`.

    torch's `update_bn` would measure those of frozen stages as well, which stand in eval.

    Args:
        model: In the mode in which it is to run.
        batches: float32 `(B, C, H, W)`, on the model's device; not asked for when there is nothing to measure.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches, each counting alike
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
