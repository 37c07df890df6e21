"""Feature maps: which layers of a network have one, and what they hold for given pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from cvtrain.core.modes import evaluating
from cvtrain.core.trunk import find_trunk
from cvtrain.errors import ConfigError, did_you_mean


def map_layers(model: nn.Module, shape: tuple[int, int, int]) -> list[str]:
    """Return the modules whose output is a feature map that every way to the logits passes, from input to output.

    So a residual block is there, but not the layers on its branch. Of several modules that return the same map it is
    the outermost. Poolings are left out: what they return is a coarser copy of the map before.

    Args:
        model: A classifier.
        shape: Channels, height and width that it takes.

    Returns:
        Paths, each called once; empty where there is none.

    Raises:
        ConfigError: The model cannot be followed.
    """
    trunk = find_trunk(model, shape)
    paths = []
    for number, places in zip(trunk.values, trunk.positions, strict=True):
        value = trunk.flow.values[number]
        once = [path for path in value.modules if trunk.once(path)]
        if once and places > 1 and "pool" not in value.op:
            # The one that did most for it; behind it may stand an identity.
            paths.append(max(reversed(once), key=lambda path: trunk.flow.spans[path][1] - trunk.flow.spans[path][0]))
    return paths


def as_map(output: Tensor, batch: int) -> Tensor | None:
    """Return what a layer gave for square pictures as `(B, C, H, W)`; None where it is no map.

    Args:
        output: `(B, C, H, W)`, `(B, H, W, C)`, or tokens `(B, N, C)` of which the last H·W are those of the places.
        batch: B.
    """
    if len(output) != batch:
        return None  # windows of the pictures
    if output.ndim == 4:
        _, first, second, third = output.shape
        return output.permute(0, 3, 1, 2) if first == second != third else output
    if output.ndim == 3:
        tokens = output.shape[1]
        side = isqrt(tokens)  # what is beyond a square, such as the class token, stands in front
        return output[:, tokens - side * side :].transpose(1, 2).reshape(batch, -1, side, side)
    return None


@contextmanager
def outputs_kept(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep what the modules at `paths` return while `model` runs, by path, in the order in which they return it."""
    found: dict[str, Tensor] = {}

    def keeping(path: str) -> Callable[..., Tensor | None]:
        def keep(_module: nn.Module, _inputs: object, output: Any) -> Tensor | None:  # noqa: ANN401 - a model's own
            if not isinstance(output, Tensor):
                return None
            found[path] = output
            return output.clone()  # what comes behind may work in place

        return keep

    with ExitStack() as hooks:
        for path in paths:
            hooks.callback(model.get_submodule(path).register_forward_hook(keeping(path)).remove)
        yield found


@torch.no_grad()
def feature_maps(model: nn.Module, images: Tensor, paths: Sequence[str]) -> dict[str, Tensor]:
    """Return the maps `(B, C, H, W)` of those of the modules at `paths` that have one, in evaluation.

    Args:
        model: A network.
        images: Its input, float32 `(B, C, H, W)`.
        paths: Of its modules.
    """
    with evaluating(model), outputs_kept(model, paths) as found:
        model(images)
    maps = {path: as_map(output, len(images)) for path, output in found.items()}
    return {path: each.float().cpu() for path, each in maps.items() if each is not None}


def chosen_maps(model: nn.Module, images: Tensor, layers: Sequence[str], count: int) -> dict[str, Tensor]:
    """Return the maps `(B, C, H, W)` of `layers`, or of `count` layers spread evenly over the depth.

    Args:
        model: A classifier.
        images: Its input, float32 `(B, C, H, W)`.
        layers: Paths of modules; none: those of `map_layers`.
        count: How many are shown where none are asked for.

    Raises:
        ConfigError: A path is unknown, or its module has no map.
    """
    if layers:
        for path in layers:
            check_layer(model, path, "layers")
        maps = feature_maps(model, images, layers)
        without = [path for path in layers if path not in maps]
        if without:
            raise no_map(model, without[0], "layers")
        return {path: maps[path] for path in layers}
    maps = feature_maps(model, images, map_layers(model, shape_of(images)))
    maps = {path: each for path, each in maps.items() if each.shape[2:].numel() > 1}
    names, last = list(maps), len(maps) - 1
    spread = dict.fromkeys(round(i * last / max(1, count - 1)) for i in range(count)) if names else {}
    return {names[i]: maps[names[i]] for i in spread}


def shape_of(images: Tensor) -> tuple[int, int, int]:
    """Return channels, height and width of `(B, C, H, W)`."""
    channels, height, width = images.shape[1:]
    return channels, height, width


def check_layer(model: nn.Module, path: str, key: str) -> None:
    """See that `model` has a module at `path`, which the option `key` names.

    Raises:
        ConfigError: It has none.
    """
    known = [name for name, _ in model.named_modules() if name]
    if path not in known:
        raise ConfigError(
            f"{key}={path} is no layer of {type(model).__name__}; {did_you_mean(path, known, 'layers')}\n"
            "cvtrain inspect what=model lists them."
        )


def no_map(model: nn.Module, path: str, key: str) -> ConfigError:
    """Return the error for a layer, named by the option `key`, that gives no map."""
    return ConfigError(
        f"{key}={path}: this {type(model.get_submodule(path)).__name__} returns no feature map, (B, C, H, W) or "
        f"(B, N, C).\nTake a convolution or a block, or leave {key} out."
    )
