"""Parameter groups for the optimizers of the `optimizer` group, which are torch's own or timm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from cvtrain.optimizer.from_timm import lion, muon

__all__ = ["lion", "muon", "param_groups"]


def param_groups(
    model: nn.Module, weight_decay: float, part_of: Callable[[str], int | None] = lambda name: 0
) -> list[dict[str, Any]]:
    """Split the trainable parameters so that weight decay spares norms, biases, tokens and position embeddings.

    What a model names in a `no_weight_decay()` of its own, as timm's do, is spared, too.

    Args:
        model: Its parameters with `requires_grad`.
        weight_decay: For the weights of convolutions and linear layers (more than one dimension).
        part_of: Maps a parameter's name to the number of the part of the model that shares its learning rate; None:
            it never trains.

    Returns:
        One or two groups for each part, in order, with `params`, `param_names`, `weight_decay` and `part`, by which
        the loop finds the factor of the group's rate.
    """
    method = getattr(model, "no_weight_decay", None)
    spared = set(method()) if callable(method) else set()
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if part is None or not parameter.requires_grad:
            continue
        decay = weight_decay if name not in spared and _is_weight(name, parameter) else 0.0
        group = groups.setdefault((part, decay), {"params": [], "param_names": [], "weight_decay": decay, "part": part})
        group["params"].append(parameter)
        group["param_names"].append(name)
    return sorted(groups.values(), key=lambda group: int(group["part"]))


def _is_weight(path: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter multiplies, rather than shifts, scales channels, or stands for itself."""
    name = path.rpartition(".")[2]
    if parameter.ndim <= 1 or "bias" in name:
        return False
    # A token or position embedding is the same for all pictures: (1, N, D); a channel's scale is (C, 1, 1).
    return "weight" in name or (len(parameter) > 1 and parameter.squeeze().ndim > 1)
