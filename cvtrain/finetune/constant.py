"""Strategies that are the same in every epoch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from cvtrain.core.stages import Stage
from cvtrain.errors import ConfigError
from cvtrain.finetune.base import RatesPhase, Strategy, layer_factors, refuse_few

Scale = Mapping[str, float] | str
"""Multipliers of the learning rate by stage, or `none`."""


class Full(Strategy):
    """Every parameter trains from the first epoch.

    Args:
        stages: Of the network, from input to output, the head last.
        fixed: Names of parameters that the network itself never trains.
        layer_decay: Rate of a stage by that of the one behind it; None: 1.
        lr_scale: Multipliers of the learning rate by stage, or `none`.
    """

    def __init__(
        self,
        stages: Sequence[Stage] = (),
        fixed: Collection[str] = (),
        layer_decay: float | None = None,
        lr_scale: Scale = "none",
    ) -> None:
        factors = tuple(layer_factors(stages, layer_decay, lr_scale))
        super().__init__(stages, [RatesPhase(name="full", first=0, epochs=1, factors=factors)], fixed)


class FeatureExtraction(Strategy):
    """The head trains on the features of a frozen network.

    Source: Donahue et al., "DeCAF", ICML 2014; Razavian et al., "CNN features off-the-shelf", CVPR Workshops 2014.
    """

    def __init__(self, stages: Sequence[Stage], fixed: Collection[str] = ()) -> None:
        refuse_few("feature_extraction", stages, 2)
        super().__init__(
            stages,
            [RatesPhase(name="feature_extraction", first=0, epochs=1, factors=(0.0,) * (len(stages) - 1) + (1.0,))],
            fixed,
        )


class Partial(Strategy):
    """The last stage and the head train; arguments as for `Full`."""

    def __init__(
        self,
        stages: Sequence[Stage],
        fixed: Collection[str] = (),
        layer_decay: float | None = None,
        lr_scale: Scale = "none",
    ) -> None:
        refuse_few("partial", stages, 3)
        factors = freezing(stages, len(stages) - 2, layer_factors(stages, layer_decay, lr_scale), lr_scale)
        super().__init__(stages, [RatesPhase(name="partial", first=0, epochs=1, factors=factors)], fixed)


class Early(Strategy):
    """The first stages are frozen, whose features are the most general ones; further arguments as for `Full`.

    Source: Yosinski et al., "How transferable are features in deep neural networks?", NeurIPS 2014.

    Args:
        early_stages: How many, from the stem on; None: half of those before the head, rounded up.
    """

    def __init__(
        self,
        early_stages: int | None,
        stages: Sequence[Stage],
        fixed: Collection[str] = (),
        layer_decay: float | None = None,
        lr_scale: Scale = "none",
    ) -> None:
        refuse_few("early", stages, 2)
        count = number_of_early(early_stages, stages, most=len(stages) - 1)
        factors = freezing(stages, count, layer_factors(stages, layer_decay, lr_scale), lr_scale)
        super().__init__(stages, [RatesPhase(name="early", first=0, epochs=1, factors=factors)], fixed)


def number_of_early(asked: int | None, stages: Sequence[Stage], most: int) -> int:
    """Return how many stages count as early: `asked`, or half of those before the head, rounded up.

    Raises:
        ConfigError: It is more than `most`.
    """
    count = len(stages) // 2 if asked is None else asked
    if count > most:
        names = ", ".join(stage.name for stage in stages)
        raise ConfigError(
            f"finetune.early_stages={count} is too many: this model has {len(stages)} stages ({names})\n"
            f"  use up to {most}, or null for half of those before the head"
        )
    return count


def freezing(stages: Sequence[Stage], count: int, factors: Sequence[float], lr_scale: Scale) -> tuple[float, ...]:
    """Return `factors` with 0 for the first `count` stages.

    Raises:
        ConfigError: `lr_scale` gives one of those a rate.
    """
    for stage in stages[:count]:
        if stage.name in lr_scale and not isinstance(lr_scale, str):
            trained = ", ".join(s.name for s in stages[count:])
            raise ConfigError(f"finetune.lr_scale names {stage.name}, which is frozen; those that train: {trained}")
    return (0.0,) * count + tuple(factors[count:])
