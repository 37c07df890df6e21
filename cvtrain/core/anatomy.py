"""Find the parts of a network by looking at it, not by a table of names."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from cvtrain.core.dataflow import BATCH, Dataflow, Value, dataflow
from cvtrain.errors import ConfigError

log = logging.getLogger("cvtrain")

ADDITIONS = ("add", "add_", "__add__", "__iadd__", "__radd__")
LONGEST_SHORTCUT = 4
"""Layers of a projection on the shortcut: two convolutions and their norms."""
HOMOGENEOUS = (
    *("mul", "mul_", "div", "neg", "relu", "relu_", "dropout", "contiguous", "clone", "to", "float"),
    *("reshape", "view", "flatten", "unflatten", "transpose", "permute", "movedim", "squeeze", "unsqueeze", "roll"),
)
"""Functions that make c·f(x) of c·x for c ≥ 0, so that a branch may be dropped before them."""


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at the dotted `path` of `model`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def first_convolution(model: nn.Module, shape: tuple[int, int, int] | None = None) -> tuple[str, nn.Conv2d]:
    """Return path and module of the first 2-D convolution.

    Args:
        model: A network.
        shape: Channels, height and width that it takes, to find the first that runs; None: the first written down.

    Raises:
        ConfigError: The model has none, or cannot be followed.
    """
    modules = dict(model.named_modules())
    for path in modules if shape is None else dataflow(model, shape).calls:
        module = modules[path]
        if isinstance(module, nn.Conv2d):
            return path, module
    raise ConfigError(f"{type(model).__name__} has no 2-D convolution to fit to the data's channels.")


def norm_layers(model: nn.Module) -> list[str]:
    """Return the paths of the layers that normalize activations, as they are written down.

    They are torch's (batch, layer, group, instance and RMS norm) and what is derived of them, whatever else keeps
    running statistics, and layers of a library's own that are called norms.
    """
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))
        or isinstance(getattr(module, "running_mean", None), Tensor)
        or ("norm" in type(module).__name__.lower() and not list(module.children()) and list(module.parameters()))
    ]


def stem_pool(model: nn.Module) -> str | None:
    """Return the path of the max-pool between the first and the second convolution, if there is one."""
    convolutions = 0
    for path, module in model.named_modules():
        convolutions += isinstance(module, nn.Conv2d)
        if convolutions > 1:
            return None
        if isinstance(module, nn.MaxPool2d) and convolutions == 1:
            return str(path)
    return None


def classifier(model: nn.Module, shape: tuple[int, int, int] | None = None) -> str:
    """Return the path of the last linear layer or convolution that runs, the one that gives the logits.

    Args:
        model: A classifier.
        shape: Channels, height and width that it takes; None: tried.

    Raises:
        ConfigError: The model cannot be followed, or has no such layer.
    """
    return _classifier(model, dataflow(model, shape))


def _classifier(model: nn.Module, flow: Dataflow) -> str:
    modules = dict(model.named_modules())
    layers = [path for path, _ in _on_the_way(flow) if isinstance(modules[path], (nn.Linear, nn.Conv2d))]
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no linear layer or convolution.")
    return layers[-1]


def _on_the_way(flow: Dataflow) -> Iterator[tuple[str, Value]]:
    """Yield path and output of each module whose output goes into the logits, in order."""
    wanted = flow.values[flow.output].ancestors
    for i, value in enumerate(flow.values):
        if wanted >> i & 1:
            yield from ((path, value) for path in value.modules)


def residual_branches(model: nn.Module, shape: tuple[int, int, int] | None = None) -> list[str]:
    """Return the module that ends each residual branch, from input to output.

    A residual connection adds to a value what was computed of it (He et al., "Deep residual learning", CVPR 2016), or
    adds two values of the same origin of which one, the shortcut, took a few layers at most to fit in shape. Whatever
    the module returns may be dropped: it goes into that addition and nowhere else, and 0 stays 0 on its way.

    Args:
        model: A classifier.
        shape: Channels, height and width that it takes; None: tried.

    Returns:
        Paths, each once.

    Raises:
        ConfigError: The model cannot be followed, or has no residual connection.
    """
    flow = dataflow(model, shape)
    connections = [sides for value in flow.values if (sides := _shortcut_and_branch(flow.values, value)) is not None]
    ends = [end for sides in connections if (end := _ending_module(flow, *sides)) is not None]
    if not ends:
        raise ConfigError(f"{type(model).__name__} has no residual branches.")
    if len(ends) < len(connections):
        log.info(
            "%d of %d residual sums take in no module's output alone", len(connections) - len(ends), len(connections)
        )
    return ends


def _shortcut_and_branch(values: list[Value], total: Value) -> tuple[int, int] | None:
    """Return the numbers of what a residual connection adds up; None where `total` is none."""
    if total.op not in ADDITIONS or len(total.operands) != 2:
        return None
    (one, one_shape), (two, two_shape) = total.operands
    if one is None or two is None or one_shape != total.shape or two_shape != total.shape:
        return None
    shortcut, branch = sorted((one, two), key=lambda i: values[i].depth)
    if values[shortcut].depth == values[branch].depth:
        return None
    if values[branch].ancestors >> shortcut & 1:
        return shortcut, branch
    common = values[shortcut].ancestors & values[branch].ancestors
    fork = common.bit_length() - 1
    if fork < 0 or values[fork].several or values[fork].shape == total.shape:
        return None  # parts of one value, or parallel layers: nothing that a projection would be for
    if values[shortcut].depth - values[fork].depth > LONGEST_SHORTCUT:
        return None
    # Between the fork and the sum nothing else may come in: queries and keys have a common origin, too.
    between = (values[shortcut].ancestors | values[branch].ancestors) & ~values[fork].ancestors
    entered = 0
    for i in range(fork + 1, len(values)):
        if between >> i & 1:
            for j in values[i].inputs:
                entered |= 1 << j
    return (shortcut, branch) if not entered & ~between & ~(1 << fork) else None


def _ending_module(flow: Dataflow, shortcut: int, branch: int) -> str | None:
    """Return the module whose output becomes the branch and nothing else; None where there is none."""
    values = flow.values
    while values[branch].uses == 1 and not values[shortcut].ancestors >> branch & 1:
        value = values[branch]
        once = [path for path in value.modules if flow.calls.count(path) == 1]
        if once and value.shape[:1] == (BATCH,):
            return once[-1]
        if value.op not in HOMOGENEOUS:
            return None
        branch = max(value.inputs, key=lambda i: values[i].depth)
    return None
