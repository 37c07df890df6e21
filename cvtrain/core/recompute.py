"""Activation checkpointing: keep the inputs of a network's blocks, and compute what is inside once more for gradients.

Source: Chen, Xu, Zhang & Guestrin, "Training deep nets with sublinear memory cost", 2016.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cvtrain.core.stages import Stage, find_stages
from cvtrain.core.trunk import Trunk, find_blocks, find_trunk
from cvtrain.errors import ConfigError

log = logging.getLogger("cvtrain")


class Recomputed:
    """Stands in the place of a module's `forward`; in training it keeps what goes in and nothing of what is inside.

    It is an attribute of the module, which `copy.deepcopy` copies with it, and no module of its own: names of
    parameters stay. Random draws are the same the second time, and buffers such as batch norm's statistics stay as the
    first time has left them.

    Args:
        module: The module.
        parts: Where to divide it if it is an `nn.Sequential`: begin and end of runs of its children, from the first
            on; those behind the last run are computed once.
    """

    def __init__(self, module: nn.Module, parts: Sequence[tuple[int, int]] = ()) -> None:
        self.module = module
        self.parts = tuple(parts)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the module takes and returns
        """Return what the module's own `forward` returns."""
        forward = type(self.module).forward
        if not (self.module.training and torch.is_grad_enabled()):
            return forward(self.module, *args, **kwargs)
        if not self.parts:
            return self._kept(functools.partial(forward, self.module), *args, **kwargs)
        (value,) = args
        for begin, end in self.parts:
            value = self._kept(functools.partial(self._part, begin, end), value)
        return self._part(self.parts[-1][1], None, value)

    def _part(self, begin: int, end: int | None, value: Tensor) -> Tensor:
        # `children` would leave out the second use of an activation.
        for child in [child for child in self.module._modules.values() if child is not None][begin:end]:
            value = child(value)
        return value

    def _kept(self, forward: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - see __call__
        return checkpoint(forward, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), BuffersAside(self.module)


class BuffersAside(AbstractContextManager[None]):
    """Lets a module that trains work on copies of its buffers, which are thrown away at the end."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._kept: list[tuple[nn.Module, str, Tensor]] = []

    def __enter__(self) -> None:
        for module in self.module.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if module.training:
                    self._kept.append((module, name, buffer))
                    module._buffers[name] = buffer.clone()

    def __exit__(self, *_: object) -> None:
        for module, name, buffer in self._kept:
            module._buffers[name] = buffer
        self._kept.clear()


def checkpoint_activations(
    model: nn.Module, shape: tuple[int, int, int], override: Sequence[Sequence[str]] | None = None
) -> list[str]:
    """Have the blocks of each stage but the head computed again in the backward pass, in place.

    Blocks are the residual and parallel ones; what else has several layers and lies in one stage is taken as a whole,
    and a plain chain in its stages.

    Args:
        model: A classifier.
        shape: Channels, height and width that it takes.
        override: As `find_stages` has it.

    Returns:
        Paths of the modules that are computed again, from input to output.

    Raises:
        ConfigError: The model cannot be followed, or has no such part.
    """
    trunk, stages = find_trunk(model, shape), find_stages(model, shape, override)
    places: dict[str, list[tuple[int, int]]] = {}
    _choose(model, "", trunk, _Plan(stages, find_blocks(trunk)), places)
    if not places:
        raise ConfigError(
            f"activation_checkpointing=true: {type(model).__name__} has no blocks to compute again; "
            "use activation_checkpointing=false."
        )
    for path, parts in places.items():
        module = model.get_submodule(path)
        module.forward = Recomputed(module, parts)
    segments = sum(len(parts) or 1 for parts in places.values())
    log.info(
        "activation checkpointing: of %d block%s only the input is kept, the rest computed again for the gradients",
        *(segments, "" if segments == 1 else "s"),
    )
    return list(places)


def keep_activations(model: nn.Module) -> None:
    """Undo `checkpoint_activations`, for what looks into the network, such as an export."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Recomputed):
            del module.forward


class _Plan:
    """Which module lies in which stages, and which are blocks."""

    def __init__(self, stages: Sequence[Stage], blocks: Sequence[str]) -> None:
        self.homes = {name: i for i, stage in enumerate(stages) for name in stage.parameters}
        self.head = len(stages) - 1
        self.blocks = blocks

    def stages(self, path: str) -> set[int]:
        """Return the numbers of the stages that the module has parameters of."""
        return {home for name, home in self.homes.items() if not path or name.startswith(f"{path}.")}

    def holds_block(self, path: str) -> bool:
        """Return whether a block lies in the module."""
        return any(not path or block.startswith(f"{path}.") for block in self.blocks)


def _choose(module: nn.Module, path: str, trunk: Trunk, plan: _Plan, places: dict[str, list[tuple[int, int]]]) -> None:
    """Put into `places` what of `module` is computed again: its path, and where a chain is divided."""
    stages = plan.stages(path)
    if not stages - {plan.head}:
        return
    if not plan.holds_block(path):
        whole = len(stages) == 1 and bool(path) and trunk.once(path)
        if path in plan.blocks or (whole and _several_layers(module)):
            places[path] = []
            return
        if type(module).forward is nn.Sequential.forward and (not path or trunk.once(path)):
            places[path] = _parts(module, path, plan)
            return
    for name, child in module.named_children():
        _choose(child, f"{path}.{name}" if path else name, trunk, plan, places)


def _several_layers(module: nn.Module) -> bool:
    return sum(next(each.parameters(recurse=False), None) is not None for each in module.modules()) > 1


def _parts(module: nn.Module, path: str, plan: _Plan) -> list[tuple[int, int]]:
    """Return where a chain is divided: where its stages begin, up to the head."""
    homes: list[int] = []
    for name in module._modules:  # `named_children` would leave out an activation's second use
        stages = plan.stages(f"{path}.{name}" if path else name)
        homes.append(max([*stages, *homes[-1:]], default=0))
    starts = [i for i, home in enumerate(homes) if i == 0 or home > homes[i - 1]]
    ends = [*starts[1:], len(homes)]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if homes[start] < plan.head]
