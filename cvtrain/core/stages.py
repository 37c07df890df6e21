"""Divide a network into stages by looking at it and following a picture through it, not by a table of names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from cvtrain.core.trunk import Trunk, find_blocks, find_trunk
from cvtrain.errors import ConfigError, did_you_mean

RUNS = 4
"""Stages of a network whose resolution stays the same, as many as most others have."""
SMALL_PART = 0.25
"""Share of the layers up to which a module that begins or ends a network counts as its stem or head as a whole."""


@dataclass(frozen=True)
class Stage:
    """A part of a network that is frozen, or given a learning rate, as a whole.

    Attributes:
        name: `stem`, `stage1`, `stage2`, … or `head`.
        modules: Paths of the outermost modules with parameters or buffers that belong to this stage alone.
        parameters: Names as in `named_parameters()`.
    """

    name: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def find_stages(
    model: nn.Module, shape: tuple[int, int, int], override: Sequence[Sequence[str]] | None = None
) -> list[Stage]:
    """Divide `model` into its stem, its stages and its head, from input to output.

    The head is everything with weights behind the pooled features, the classifier in any case; a norm in front of the
    pooling belongs to the last stage. The stem is what comes before the first residual or parallel block, in a network
    without such blocks what comes before the resolution drops for the second time. Between them a stage begins where
    the resolution drops, with the layers that lower it; a block is never cut in two. A network whose resolution stays
    the same (ViT, Mixer) has four near-equal runs of blocks. A parameter that belongs to no module that runs is the
    stem's where the network itself holds it (a mask token), else the head's (an auxiliary classifier).

    Args:
        model: A classifier.
        shape: Channels, height and width that it takes.
        override: For each stage, from input to output, paths of modules or parameters; the longest path that fits
            a parameter decides. None: found.

    Returns:
        Two stages or more, each parameter in exactly one of them; the head alone if the network has only one layer.

    Raises:
        ConfigError: The model cannot be followed, or `override` does not fit it.
    """
    homes = _given(model, override) if override is not None else _found(model, shape)
    count = max(homes.values()) + 1
    names = ["stem", *(f"stage{i}" for i in range(1, count - 1)), "head"][-count:]
    modules = _outermost(model, homes)
    parameters = [name for name, _ in model.named_parameters()]
    return [
        Stage(name, tuple(modules[i]), tuple(each for each in parameters if homes[each] == i))
        for i, name in enumerate(names)
    ]


def _found(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, int]:
    """Return the number of the stage of each parameter, and of a buffer of each module that has no parameters."""
    trunk = find_trunk(model, shape)
    starts = _starts(trunk, find_blocks(trunk))
    homes = {use.name: sum(start <= i for start in starts) for i, use in enumerate(trunk.uses)}
    last = max(homes.values(), default=0)
    for name in _stateful(model):
        if name not in homes:
            homes[name] = _home_of_unused(trunk, homes, name, last)
    return homes


def _starts(trunk: Trunk, blocks: list[str]) -> list[int]:
    """Return where in `trunk.uses` the second stage, the third, …, and at last the head begin."""
    head = _head(trunk)
    if head <= 0:
        return []
    drops = {
        _snapped(trunk, blocks, i)
        for i in range(1, head)
        if trunk.level(trunk.uses[i]) > trunk.level(trunk.uses[i - 1])
    }
    drops.discard(0)
    stem = _stem(trunk, blocks, head, drops)
    inner = sorted(drop for drop in drops if stem < drop < head)
    if not inner:
        return [*_runs(trunk, head, stem), head]
    return [*([stem] if 0 < stem < head else []), *inner, head]


def _head(trunk: Trunk) -> int:
    """Return where in `trunk.uses` the head begins."""
    uses, values = trunk.uses, trunk.values
    layers = [i for i, use in enumerate(uses) if use.layer] or list(range(len(uses)))
    if not layers:
        return 0
    begin = min(i for i, use in enumerate(uses) if use.time == uses[layers[-1]].time)  # the classifier
    last_map = max(k for k, positions in enumerate(trunk.positions) if positions > 1 or k == 0)
    behind = next((i for i, use in enumerate(uses) if use.time > values[last_map]), len(uses))
    if last_map > 0 and behind > layers[0]:  # there is a trunk, and pictures are not flattened first
        begin = min(begin, behind)
    if begin == 0:
        return 0
    # Such as a pooling with weights of its own whose tokens are still several, or two classifiers.
    around = _common(uses[begin - 1].owner, uses[begin].owner)
    inside = [i for i, use in enumerate(uses) if use.owner == around or use.owner.startswith(f"{around}.")]
    small = sum(uses[i].layer for i in inside) <= SMALL_PART * len(layers)
    return min(inside) if around and small else begin


def _stem(trunk: Trunk, blocks: list[str], head: int, drops: set[int]) -> int:
    """Return where in `trunk.uses` the stem ends; 0 where only the runs of an unchanging network can tell."""
    uses = trunk.uses
    layers = sum(use.layer for use in uses[:head])
    first_block = min((trunk.within(path).start for path in blocks), default=head)
    if 0 < first_block < head and sum(use.layer for use in uses[:first_block]) <= layers / 2:
        return first_block
    if first_block > 0:
        return min(drops, default=0)
    parts = uses[0].owner.split(".")
    for length in range(1, len(parts) + 1):
        path = ".".join(parts[:length])
        if path in trunk.flow.spans:
            stop = trunk.within(path).stop
            if sum(use.layer for use in uses[:stop]) <= SMALL_PART * layers:
                return stop
    return min(drops, default=0)


def _snapped(trunk: Trunk, blocks: list[str], drop: int) -> int:
    """Return `drop`, or the begin of the block, or of the norm and layer, that it would cut in two."""
    for path in blocks:
        within = trunk.within(path)
        if within.start < drop < within.stop:
            return within.start
    uses = trunk.uses
    around = _common(uses[drop - 1].owner, uses[drop].owner)
    if around and around in trunk.flow.spans:
        within = trunk.within(around)
        if within.start < drop < within.stop and not any(uses[i].layer for i in range(within.start, drop)):
            return within.start
    return drop


def _runs(trunk: Trunk, head: int, stem: int) -> list[int]:
    """Return where the stages of a network without drops of resolution begin: runs of the modules it repeats most."""
    siblings: dict[tuple[str, type], list[int]] = {}
    layers: Counter[tuple[str, type]] = Counter()
    for path, kind in trunk.kinds.items():
        within = trunk.within(path)
        count = sum(trunk.uses[i].layer for i in within)
        if count and within.stop <= head and trunk.once(path):
            key = (path.rpartition(".")[0], kind)
            siblings.setdefault(key, []).append(within.start)
            layers[key] += count
    repeated = {key: count for key, count in layers.items() if len(siblings[key]) > 1}
    if not repeated:
        return [stem] if 0 < stem < head else []
    begins = sorted(siblings[max(repeated, key=lambda key: repeated[key])])
    if begins[0] == 0:  # the first of them is the stem
        begins = begins[1:]
    runs = min(RUNS, len(begins))
    return sorted({begins[i * len(begins) // runs] for i in range(runs)})


def _common(one: str, other: str) -> str:
    """Return the path of the smallest module around two modules, empty for the network itself."""
    shared: list[str] = []
    for mine, others in zip(one.split("."), other.split("."), strict=False):
        if mine != others:
            break
        shared.append(mine)
    return ".".join(shared)


def _stateful(model: nn.Module) -> Iterator[str]:
    """Yield the names of all parameters, and one buffer of each module that has buffers alone."""
    yield from (name for name, _ in model.named_parameters())
    for path, module in model.named_modules():
        buffers = [name for name, _ in module.named_buffers(recurse=False)]
        if buffers and next(module.parameters(recurse=False), None) is None:
            yield f"{path}.{buffers[0]}" if path else buffers[0]


def _home_of_unused(trunk: Trunk, homes: dict[str, int], name: str, last: int) -> int:
    path = name.rpartition(".")[0]
    if not path:
        return 0
    while path and path not in trunk.flow.spans:
        path = path.rpartition(".")[0]
    around = {homes[trunk.uses[i].name] for i in trunk.within(path)} if path else set()
    return around.pop() if len(around) == 1 else last


def _outermost(model: nn.Module, homes: dict[str, int]) -> list[list[str]]:
    """Return for each stage the outermost modules that have all their parameters and buffers in it."""
    within: dict[str, set[int]] = {}
    for name, home in homes.items():
        parts = name.split(".")
        for length in range(len(parts)):
            within.setdefault(".".join(parts[:length]), set()).add(home)
    modules: list[list[str]] = [[] for _ in range(max(homes.values()) + 1)]
    for path, _ in model.named_modules():
        alone = within.get(path, set())
        if path and len(alone) == 1 and len(within[path.rpartition(".")[0]]) > 1:
            modules[next(iter(alone))].append(path)
    if len(modules) == 1:
        modules[0] = [path for path, _ in model.named_children()]
    return modules


def _given(model: nn.Module, override: Sequence[Sequence[str]]) -> dict[str, int]:
    """Return the number of the stage of each parameter and buffer, as the user has it.

    Raises:
        ConfigError: Fewer than two stages, a path that is unknown, twice there or without parameters, or a parameter
            that no path covers.
    """
    names = list(_stateful(model))
    known = [*(path for path, _ in model.named_modules() if path), *names]
    stages: dict[str, int] = {}
    for i, paths in enumerate(override):
        for path in paths:
            if path not in known:
                raise ConfigError(f"stages: {path} is no module of this network; {did_you_mean(path, known, 'paths')}")
            if path in stages:
                raise ConfigError(f"stages: {path} stands in stages {stages[path] + 1} and {i + 1}; name it once.")
            stages[path] = i
    homes = {name: stages[covering] for name in names if (covering := _covering(name, stages)) is not None}
    missing = [name for name, _ in model.named_parameters() if name not in homes]
    if missing:
        raise ConfigError(
            f"stages: {missing[0]}{f' and {len(missing) - 1} more parameters' if missing[1:] else ''} of this network "
            "are in no stage.\nName the modules around them in one of the lists, the head's last."
        )
    empty = [i for i in range(len(override)) if i not in homes.values()]
    if len(override) < 2 or empty:
        raise ConfigError(
            f"stages: {f'stage {empty[0] + 1} holds no parameters' if empty else 'one list is one stage'}; "
            "give two lists of module paths or more, from input to output, the head's last."
        )
    return {**dict.fromkeys(names, 0), **homes}


def _covering(name: str, stages: dict[str, int]) -> str | None:
    path = name
    while path and path not in stages:
        path = path.rpartition(".")[0]
    return path or None
