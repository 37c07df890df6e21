"""Find the parts of a network by looking at it, not by a table of names."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from cvtrain.errors import ConfigError


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at the dotted `path` of `model`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d]:
    """Return path and module of the first 2-D convolution.

    Raises:
        ConfigError: The model has none.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return path, module
    raise ConfigError(f"{type(model).__name__} has no 2-D convolution to fit to the data's channels.")


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


def residual_branches(model: nn.Module) -> list[str]:
    """Return the module that ends each residual branch, from input to output.

    An addition of two values that share an ancestor is a residual connection; its longer side is the branch.

    Raises:
        ConfigError: The model cannot be traced, or has no residual connection.
    """
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:  # torch.fx raises whatever the model's own control flow raises
        raise ConfigError(f"{type(model).__name__} cannot be traced for residual branches ({error}).") from error
    ancestors: dict[fx.Node, set[fx.Node]] = {}
    depth: dict[fx.Node, int] = {}
    ends: list[str] = []
    for node in graph.nodes:
        inputs = node.all_input_nodes
        ancestors[node] = {node}.union(*(ancestors[i] for i in inputs)) if inputs else {node}
        depth[node] = 1 + max((depth[i] for i in inputs), default=-1)
        if _is_addition(node) and len(inputs) == 2 and _share_input(ancestors[inputs[0]], ancestors[inputs[1]]):
            branch = max(inputs, key=lambda n: depth[n])
            while branch.op != "call_module" and branch.all_input_nodes:
                branch = max(branch.all_input_nodes, key=lambda n: depth[n])
            if branch.op == "call_module":
                ends.append(str(branch.target))
    if not ends:
        raise ConfigError(f"{type(model).__name__} has no residual branches.")
    return ends


def _is_addition(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in (operator.add, operator.iadd, torch.add)
    return node.op == "call_method" and node.target in ("add", "add_")


def _share_input(left: set[fx.Node], right: set[fx.Node]) -> bool:
    return any(node.op == "placeholder" for node in left & right)
