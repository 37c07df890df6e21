"""What both ways of pruning share: stages, their files, and the points of their trade-off curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from cvtrain.compression.steps import artifact_file
from cvtrain.core.artifact import TORCH, Artifact, CompressionContext, TradeOff
from cvtrain.core.complexity import count_macs, count_params
from cvtrain.errors import ConfigError

Shrink = Callable[[nn.Module, float], nn.Module]
"""`shrink(model, amount)` returns a fine-tuned copy of the stage before, of whose first such an amount is gone."""


def check_stages(where: str, iterative_steps: Sequence[float] | None) -> tuple[float, ...] | None:
    """Return the stages of a pruning, None where there are none.

    Args:
        where: The option, for the error.
        iterative_steps: Shares, each above 0 and below 1.

    Raises:
        ConfigError: They do not rise, or leave that range.
    """
    if iterative_steps is None:
        return None
    steps = tuple(iterative_steps)
    if not steps or not all(0 < step < 1 for step in steps) or any(low >= high for low, high in pairwise(steps)):
        raise ConfigError(
            f"{where}.iterative_steps={list(steps)}: must be shares that rise, each above 0 and below 1, "
            "such as [0.1,0.2,0.3,0.5]"
        )
    return steps


def run_stages(
    model: nn.Module,
    name: str,
    context: CompressionContext,
    *,
    amounts: Sequence[float],
    shrink: Shrink,
    describe: Callable[[nn.Module], str],
    effective_params: Callable[[nn.Module], int],
    removed: Callable[[nn.Module], float],
) -> tuple[nn.Module, tuple[Artifact, ...], tuple[TradeOff, ...]]:
    """Prune in one stage or several, and save the model behind each.

    Args:
        model: The model before; never changed.
        name: Of the last artifact; those before it have their percentage behind it: `pruned10`.
        context: Uses `folder`, `example`, `save_weights`, and with several stages `evaluate`.
        amounts: Of the stages, rising.
        shrink: Does one of them.
        describe: Returns the note of a stage's artifact.
        effective_params: Counts the parameters that a stage has left.
        removed: Returns the share that is really gone.

    Returns:
        The last stage's model; one artifact a stage; and where there are several, the trade-off curve.
    """
    several = len(amounts) > 1
    artifacts: list[Artifact] = []
    points: list[TradeOff] = []

    def point(network: nn.Module, artifact: str) -> None:
        if several:
            macs = count_macs(network, context.example)
            accuracy = context.evaluate(network)
            points.append(TradeOff(removed(network), effective_params(network), macs, accuracy, artifact))

    point(model, "")
    current = model
    for amount in amounts:
        current = shrink(current, amount)
        stage = name if amount == amounts[-1] else f"{name}{100 * amount:g}"
        path = context.folder / artifact_file(stage, ".safetensors")
        context.save_weights(current, path, {})
        artifacts.append(
            Artifact(
                name=stage,
                path=path,
                runtime=TORCH,
                params=count_params(current),
                macs=count_macs(current, context.example),
                exact=False,
                note=describe(current),
            )
        )
        point(current, stage)
    return current, tuple(artifacts), tuple(points)
