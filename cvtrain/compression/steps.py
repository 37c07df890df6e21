"""Applying the steps of the `compression` group one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from torch import nn

from cvtrain.core.artifact import Artifact, CompressionContext, CompressionStep
from cvtrain.errors import ConfigError


def artifact_file(name: str, suffix: str) -> str:
    """Return the file name of artifact `name`: `pruned+int8` and `.onnx` give `pruned_int8.onnx`."""
    return name.replace("+", "_") + suffix


def _cannot_follow(follower: str, last: str) -> ConfigError:
    return ConfigError(
        f"compression: {follower!r} cannot follow {last!r}, which leaves PyTorch and ends the chain.\n"
        f"Put {last!r} last: compression=[{follower},{last}]"
    )


def check_order(steps: Mapping[str, CompressionStep]) -> None:
    """Refuse an order that cannot work, before any training is spent on it.

    Knows only the steps that say `leaves_torch = True` about themselves; `run_steps` finds the others as it runs.

    Args:
        steps: Steps by option name, in the order given.

    Raises:
        ConfigError: A step stands behind one after which nothing can follow.
    """
    names = list(steps)
    for last, follower in itertools.pairwise(names):
        if getattr(steps[last], "leaves_torch", False):
            raise _cannot_follow(follower, last)


def run_steps(steps: Mapping[str, CompressionStep], model: nn.Module, context: CompressionContext) -> list[Artifact]:
    """Apply `steps` in order, each to the result of the one before.

    Args:
        steps: Steps by option name, in the order given.
        model: The trained model, on the CPU; never changed.
        context: What the steps may use.

    Returns:
        One artifact a step, named by the labels so far joined with `+`: `pruned`, `pruned+int8`.

    Raises:
        ConfigError: A step stands behind one after which nothing can follow.
    """
    check_order(steps)
    artifacts: list[Artifact] = []
    labels: list[str] = []
    current: nn.Module | None = model
    previous = ""
    for option, step in steps.items():
        if current is None:
            raise _cannot_follow(option, previous)
        labels.append(step.label)
        result = step.apply(current, "+".join(labels), context)
        artifacts.append(result.artifact)
        current, previous = result.model, option
    return artifacts
