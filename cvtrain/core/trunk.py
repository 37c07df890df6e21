"""The trunk of a network: the values that every way from the pictures to the logits passes, and the blocks between."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from torch import nn

from cvtrain.core.dataflow import BATCH, Dataflow, Value, dataflow
from cvtrain.errors import ConfigError

LARGE = 224
"""Sides from which no common network shrinks its map to one point before it means to."""
HALVED = 0.5
"""Share of the positions that is left where a resolution drops: half of them where one side is halved."""
JOINS = ("add", "add_", "__add__", "__iadd__", "__radd__", "cat", "concat", "stack")
"""What parallel ways of a block end in; a product is a gate, such as squeeze-and-excitation."""


@dataclass(frozen=True)
class Use:
    """Where a parameter, or a module that has buffers alone, first takes part.

    Attributes:
        time: Number of the value that was the first to be made with it.
        name: Of the parameter, or of a buffer of that module.
        owner: Path of the module that it is in.
        layer: Whether it is the weight of a layer: a matrix or more, so no bias, norm, token or layer scale.
    """

    time: int
    name: str
    owner: str
    layer: bool


@dataclass(frozen=True)
class Trunk:
    """A network's course from input to output.

    Attributes:
        flow: What happened to the pictures.
        values: Numbers of the values that every way passes, the pictures first, the logits last.
        positions: For each of them, how many places of the picture it tells apart.
        levels: For each of them, how often the resolution has dropped before.
        uses: Parameters and modules with buffers that take part, in the order in which they do.
        kinds: Class of each module that is called, by path.
    """

    flow: Dataflow
    values: list[int]
    positions: list[int]
    levels: list[int]
    uses: list[Use]
    kinds: dict[str, type[nn.Module]]

    def level(self, use: Use) -> int:
        """Return how often the resolution has dropped up to what is made with `use`."""
        return self.levels[min(bisect.bisect_left(self.values, use.time), len(self.values) - 1)]

    def within(self, path: str) -> range:
        """Return the positions in `uses` of what takes part while the module at `path` runs for the first time."""
        begin, end = self.flow.spans[path]
        return range(*(bisect.bisect_left(self.uses, time, key=lambda use: use.time) for time in (begin, end)))

    def once(self, path: str) -> bool:
        """Return whether the module at `path` is called, and not several times."""
        return self.flow.calls.count(path) == 1


def follow(model: nn.Module, shape: tuple[int, int, int]) -> Dataflow:
    """Follow a picture of `shape` through `model`, or one some times as large where the model takes that.

    Raises:
        ConfigError: The model cannot be followed.
    """
    channels, *sides = shape
    times = -(-LARGE // min(sides))
    if times > 1:
        try:
            return dataflow(model, (channels, sides[0] * times, sides[1] * times))
        except ConfigError:
            pass  # it takes no other size
    return dataflow(model, shape)


def find_trunk(model: nn.Module, shape: tuple[int, int, int]) -> Trunk:
    """Follow a picture through `model`, and tell how its resolution drops on the way.

    Args:
        model: A classifier.
        shape: Channels, height and width that it takes.

    Raises:
        ConfigError: The model cannot be followed.
    """
    flow = follow(model, shape)
    values = _dominators(flow.values, flow.output)
    positions, levels = [_positions(flow.values[0].shape, 0)], [0]
    for before, now in pairwise(values):
        value, current = flow.values[now], positions[-1]
        # What is only laid out anew, (B, C, N) for (B, N, C) or a window as a dimension, has the places that it had.
        same = prod(value.shape) == prod(flow.values[before].shape)
        laid_out = value.depth == flow.values[before].depth and (same or len(value.shape) not in (2, 4))
        positions.append(current if laid_out else _positions(value.shape, current))
        levels.append(levels[-1] + (positions[-1] <= HALVED * current))
    kinds = {path: type(module) for path, module in model.named_modules() if path in flow.spans}
    return Trunk(flow, values, positions, levels, _uses(model, flow), kinds)


def find_blocks(trunk: Trunk) -> list[str]:
    """Return the outermost modules that are residual or parallel blocks, or of the same class as one, in order."""
    values, spans = trunk.flow.values, trunk.flow.spans
    classes: set[type[nn.Module]] = set()
    for before, now in pairwise(trunk.values):
        if values[now].op not in JOINS or len(values[now].inputs) < 2 or values[now].depth == values[before].depth:
            continue
        first = next((i for i in range(before + 1, now) if values[now].ancestors >> i & 1), now)
        around = [path for path, (begin, end) in spans.items() if begin <= first and now < end]
        if around:
            classes.add(trunk.kinds[min(around, key=lambda path: spans[path][1] - spans[path][0])])
    blocks: list[str] = []
    for path in sorted(spans, key=lambda path: (spans[path][0], path.count("."))):
        inside = any(path.startswith(f"{block}.") for block in blocks)
        if trunk.kinds[path] in classes and not inside and trunk.once(path) and _at_one_level(trunk, path):
            blocks.append(path)
    return blocks


def _dominators(values: Sequence[Value], output: int) -> list[int]:
    """Return the numbers of the values on all ways to `output` (Cooper, Harvey & Kennedy 2001, without cycles)."""
    nearest = [0] * len(values)

    def shared(one: int, other: int) -> int:
        while one != other:
            one, other = (nearest[one], other) if one > other else (one, nearest[other])
        return one

    for number in range(1, output + 1):
        nearest[number] = functools.reduce(shared, values[number].inputs)
    chain = [output]
    while chain[-1]:
        chain.append(nearest[chain[-1]])
    return chain[::-1]


def _positions(shape: tuple[int, ...], current: int) -> int:
    """Return how many places a value tells apart, which had `current` before; its layout shows in equal sides."""
    if shape[:1] != (BATCH,):
        return current
    if len(shape) <= 2:
        return 1
    if len(shape) == 3:
        return current if shape[2] == current != shape[1] else shape[1]
    if len(shape) > 4:
        return prod(shape[1:-1])
    _, first, second, third = shape
    readings = {"NCHW": second * third, "NHWC": first * second}
    if second == third != first:
        return readings["NCHW"]
    if first == second != third:
        return readings["NHWC"]
    return current if current in readings.values() else readings["NCHW"]


def _uses(model: nn.Module, flow: Dataflow) -> list[Use]:
    uses = []
    for name, parameter in model.named_parameters():
        if id(parameter) in flow.first_use:
            owner = name.rpartition(".")[0]
            matrix = parameter.ndim >= 2 and parameter.numel() > max(parameter.shape)
            uses.append(Use(flow.first_use[id(parameter)], name, owner, matrix))
    for path, module in model.named_modules():
        buffers = [name for name, _ in module.named_buffers(recurse=False)]
        if path in flow.spans and buffers and next(module.parameters(recurse=False), None) is None:
            uses.append(Use(flow.spans[path][0], f"{path}.{buffers[0]}", path, False))
    return sorted(uses, key=lambda use: use.time)


def _at_one_level(trunk: Trunk, path: str) -> bool:
    """Return whether the module has weights, and the resolution drops once at most while it runs."""
    within = trunk.within(path)
    return bool(within) and trunk.level(trunk.uses[within[-1]]) - trunk.level(trunk.uses[within[0]]) <= 1
