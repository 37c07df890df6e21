"""A pruned network as plain numbers: which tensors of the dense one became how small."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from cvtrain.errors import WeightsError


def plan_of(dense: nn.Module, pruned: nn.Module) -> dict[str, list[int]]:
    """Return the shape of each parameter and buffer of `pruned` that is smaller than in `dense`, by its name.

    Args:
        dense: The network as its config node builds it.
        pruned: The same with some channels removed.

    Returns:
        Plain JSON, for `apply_plan`; empty where no channel was removed.
    """
    before = _tensors(dense)
    return {
        name: list(tensor.shape)
        for name, tensor in _tensors(pruned).items()
        if name in before and tensor.shape != before[name].shape
    }


def apply_plan(model: nn.Module, plan: object) -> None:
    """Give a dense network the shapes of a pruned one, in place.

    Args:
        model: Dense, as its config node builds it. Of each tensor the leading part stays, until weights are loaded.
        plan: Of `plan_of`, or read from a file that nobody has vouched for.

    Raises:
        WeightsError: The plan is none, or would do anything but make tensors of this network smaller.
    """
    if not isinstance(plan, dict):
        raise _damaged(f"it is {type(plan).__name__}, not a mapping")
    own = _tensors(model)
    for name, shape in plan.items():
        if name not in own:
            raise _damaged(f"this network has no {str(name)[:80]!r}")
        before = tuple(own[name].shape)
        # True is an int to Python, but no number of channels.
        fits = isinstance(shape, list) and len(shape) == len(before) and all(type(size) is int for size in shape)
        if not fits or not all(1 <= size <= most for size, most in zip(shape, before, strict=True)):
            raise _damaged(f"{name} cannot have the shape {str(shape)[:80]}, of {list(before)}")
    for name, shape in plan.items():
        part = own[name].detach()[tuple(slice(size) for size in shape)]
        set_tensor(model, name, part.clone())
    for path in {str(name).rpartition(".")[0] for name in plan}:
        fit_sizes(model.get_submodule(path))


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` in the place of the parameter or buffer `name`; a parameter stays one, frozen if it was."""
    path, _, own = name.rpartition(".")
    owner = model.get_submodule(path)
    before = getattr(owner, own)
    if isinstance(before, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=before.requires_grad)
    setattr(owner, own, tensor)


def fit_sizes(module: nn.Module) -> None:
    """Set the numbers of channels that a layer tells of itself to those of its weights."""
    weight = getattr(module, "weight", None)
    if isinstance(module, _NormBase):
        sized = weight if weight is not None else module.running_mean
        module.num_features = module.num_features if sized is None else len(sized)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, _ConvNd):
        if module.groups > 1 and module.groups == module.in_channels == module.out_channels:  # one filter a channel
            module.groups = weight.shape[0]
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(weight)
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def _damaged(reason: str) -> WeightsError:
    return WeightsError(f"the weights' channel plan is damaged: {reason}. Use a file of a run's compressed/ folder.")
