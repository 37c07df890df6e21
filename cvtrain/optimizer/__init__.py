"""Parameter groups for the optimizers of the `optimizer` group, which are torch's own."""

from __future__ import annotations

from typing import Any

from torch import nn


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters so that weight decay spares norms and biases.

    Args:
        model: Its parameters with `requires_grad`.
        weight_decay: For the weights of convolutions and linear layers (more than one dimension).

    Returns:
        One or two groups with `params`, `param_names`, `weight_decay`.
    """
    groups: dict[float, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault(decay, {"params": [], "param_names": [], "weight_decay": decay})
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())
