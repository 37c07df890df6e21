"""Unfreezing step by step within one run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cvtrain.core.stages import Stage
from cvtrain.errors import ConfigError
from cvtrain.finetune.base import RatesPhase, Strategy, refuse_few
from cvtrain.finetune.constant import number_of_early


class Progressive(Strategy):
    """The head first, then the late stages with it, then all: features change only once the head knows its task.

    The rates of a phase replace the optimizer's, and the run's schedule starts anew in each phase, over that phase's
    epochs: its curve, whose base is the head's rate, is multiplied by (rate of the stage) / (rate of the head).

    Source: Howard & Ruder, "Universal language model fine-tuning for text classification", ACL 2018 (gradual
    unfreezing, discriminative rates).

    Args:
        phases: Name -> `epochs`, `head_lr`, `late_lr`, `early_lr`, in order. A rate of None freezes the stages; the
            last phase may have None for its epochs: what the others leave.
        early_stages: How many stages count as early, from the stem on; None: half of those before the head, rounded
            up. The rest up to the head is late.
        stages: Of the network, from input to output, the head last.
        epochs: Of the run.
        fixed: Names of parameters that the network itself never trains.

    Raises:
        ConfigError: Epochs that do not fit, a phase without a rate for the head, stages that are frozen again, or a
            network of fewer than three stages.
    """

    def __init__(
        self,
        phases: Mapping[str, Mapping[str, Any] | None],
        early_stages: int | None,
        stages: Sequence[Stage],
        epochs: int,
        fixed: Collection[str] = (),
    ) -> None:
        refuse_few("progressive", stages, 3)
        early = number_of_early(early_stages, stages, most=len(stages) - 2)
        counts = (early, len(stages) - early - 1)
        given = {str(name): phase for name, phase in phases.items() if phase is not None}
        made: list[RatesPhase] = []
        for (name, phase), length in zip(given.items(), _lengths(given, epochs), strict=True):
            head_lr = phase.get("head_lr")
            if head_lr is None:
                raise ConfigError(f"finetune.phases.{name}.head_lr=null: the head trains in all phases; give it a rate")
            rates = [phase.get(key) or 0.0 for key in ("early_lr", "late_lr")]
            factors = (rates[0] / head_lr,) * counts[0] + (rates[1] / head_lr,) * counts[1] + (1.0,)
            if made and any(before and not now for before, now in zip(made[-1].factors, factors, strict=True)):
                raise ConfigError(
                    f"finetune.phases.{name} freezes stages again that {made[-1].name} trains; give them a rate, "
                    "early_lr or late_lr."
                )
            first = sum(p.epochs for p in made)
            made.append(RatesPhase(name=name, first=first, epochs=length, lr=float(head_lr), factors=factors))
        super().__init__(stages, made, fixed)


def _lengths(phases: Mapping[str, Mapping[str, Any]], epochs: int) -> list[int]:
    """Return how many epochs each phase has.

    Raises:
        ConfigError: They do not make up the run's, or a phase other than the last has no number.
    """
    given = [phase.get("epochs") for phase in phases.values()]
    for name, length in list(zip(phases, given, strict=True))[:-1]:
        if length is None:
            raise ConfigError(f"finetune.phases.{name}.epochs=null: only the last phase takes what the others leave.")
    known = [int(length) for length in given if length is not None]
    rest = [epochs - sum(known)] if len(known) < len(given) else []
    if not given or (rest[0] < 1 if rest else sum(known) != epochs):
        taken = " + ".join([*map(str, known), *(["the rest"] if rest else [])]) or "0"
        raise ConfigError(
            f"finetune: the phases take {taken} epochs, the run has {epochs}\n"
            f"  set epochs={'at least ' if rest else ''}{max(1, sum(known) + len(rest))}, or change "
            "finetune.phases.NAME.epochs"
        )
    return known + rest
