"""What every strategy has in common: phases, each with a factor for every stage, 0 where it is frozen."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import nn

from cvtrain.core.phases import Phase, phase_at
from cvtrain.core.stages import Stage
from cvtrain.errors import ConfigError, did_you_mean

_PARAMETRIZED = re.compile(r"\bparametrizations\.(\w+)\.original$")


@dataclass(frozen=True, kw_only=True)
class RatesPhase(Phase):
    """Epochs in which the same stages train at the same rates.

    With an `lr` of its own it has a cycle of the schedule of its own, too.

    Attributes:
        factors: What the base learning rate is multiplied by for each stage, from input to output; 0: it is frozen.
    """

    factors: tuple[float, ...]


class Strategy:
    """Freezes stages and gives them their rates, as a pure function of the epoch: nothing is stored for a resume.

    A frozen stage has no gradients and no optimizer state, and computes what it does in evaluation: its batch norm
    keeps its statistics, its dropout and stochastic depth rest. So it stays as it is to the bit, and what stands
    before the first stage that trains needs no backward pass.

    Args:
        stages: Of the network, from input to output, the head last.
        phases: One or more, in order, with a factor a stage.
        fixed: Names of parameters that the network itself never trains, such as a sine position embedding.
    """

    def __init__(self, stages: Sequence[Stage], phases: Sequence[RatesPhase], fixed: Collection[str] = ()) -> None:
        self.stages, self.phases, self.fixed = tuple(stages), tuple(phases), frozenset(fixed)
        # Stages that always have the same rate are one part: each has optimizer groups, which cost a tiny model time.
        together: dict[tuple[float, ...], set[str]] = {}
        for stage, factors in zip(stages, zip(*(phase.factors for phase in phases), strict=True), strict=True):
            if any(factors):
                together.setdefault(factors, set()).update(stage.parameters)
        if not any(factor != 1 for phase in phases for factor in phase.factors):
            together = {}
        self._rates = list(together)
        self._parts = {name: i for i, names in enumerate(together.values()) for name in names}

    def phase(self, epoch: int) -> RatesPhase:
        """Return the phase that `epoch` belongs to; the last one for epochs after the end."""
        return phase_at(self.phases, epoch)

    def cycle(self, epoch: int) -> RatesPhase | None:
        """Return the phase of `epoch` if it has a learning-rate cycle of its own."""
        phase = self.phase(epoch)
        return None if phase.lr is None else phase

    def factors(self, epoch: int) -> tuple[float, ...]:
        """Return what the learning rate of each part is multiplied by in `epoch`; 0: frozen."""
        if not self._rates:
            return (1.0,)
        number = self.phases.index(self.phase(epoch))
        return tuple(factors[number] for factors in self._rates)

    def part_of(self, name: str) -> int | None:
        """Return the number of the part that a parameter belongs to; None: it never trains."""
        return self._parts.get(original(name)) if self._rates else 0

    def apply(self, model: nn.Module, epoch: int) -> bool:
        """Set `requires_grad` for `epoch`, take the gradients of what is frozen; return whether anything changed."""
        frozen = {name for stage in self._frozen(epoch) for name in stage.parameters}
        ours = {name for stage in self.stages for name in stage.parameters} - self.fixed
        changed = False
        for name, parameter in model.named_parameters():
            if original(name) not in ours:
                continue
            trains = original(name) not in frozen
            changed |= parameter.requires_grad != trains
            parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None
        return changed

    def train(self, model: nn.Module, epoch: int) -> None:
        """Put `model`, or a copy of it, into training mode, and the stages that are frozen in `epoch` into eval."""
        model.train()
        frozen = self._frozen(epoch)
        for stage in frozen:
            for path in stage.modules:
                model.get_submodule(path).eval()
        if frozen:
            _rest_between_frozen(model, {name for stage in frozen for name in stage.parameters})

    def last(self) -> Strategy:
        """Return what holds in the last phase, for every epoch, at rates relative to the run's."""
        return Strategy(self.stages, [dataclasses.replace(self.phases[-1], first=0, lr=None)], self.fixed)

    def _frozen(self, epoch: int) -> list[Stage]:
        return [stage for stage, factor in zip(self.stages, self.phase(epoch).factors, strict=True) if not factor]


def _rest_between_frozen(model: nn.Module, frozen: AbstractSet[str]) -> None:
    """Put what has no weights, such as dropout, into eval where the weights before and behind it are `frozen`."""
    waiting: list[nn.Module] = []
    rests = True
    for path, module in model.named_modules():
        own = [original(f"{path}.{name}".lstrip(".")) for name, _ in module.named_parameters(recurse=False)]
        if not own:
            if next(module.children(), None) is None:
                waiting.append(module)
            continue
        if rests and frozen >= set(own):
            for each in waiting:
                each.eval()
        rests, waiting = frozen >= set(own), []


def original(name: str) -> str:
    """Return a parameter's name in the network as it was built; torch renames what it masks or parametrizes."""
    return _PARAMETRIZED.sub(r"\1", name.removesuffix("_orig"))


def layer_factors(
    stages: Sequence[Stage], layer_decay: float | None, lr_scale: Mapping[str, float] | str
) -> list[float]:
    """Return what the learning rate of each stage is multiplied by.

    With a decay d, stage i of n has d^(n - 1 - i): the head 1, the stage before it d. Source: Howard & Ruder,
    "Universal language model fine-tuning", ACL 2018 (discriminative fine-tuning, by layer); Clark et al., "ELECTRA",
    ICLR 2020. Here it is by stage for all networks, so those of a transformer's blocks that form a stage share a rate.

    Args:
        stages: From input to output.
        layer_decay: Above 0 and at most 1; None: 1.
        lr_scale: Multipliers by stage, 1 for the others; `none`: 1 for all.

    Raises:
        ConfigError: `lr_scale` names no stage of this network.
    """
    scale = {} if isinstance(lr_scale, str) else dict(lr_scale)
    names = [stage.name for stage in stages]
    for name in scale:
        if name not in names:
            raise ConfigError(f"finetune.lr_scale={{{name}: {scale[name]}}}: {did_you_mean(name, names, 'stages')}")
    decay = 1.0 if layer_decay is None else layer_decay
    return [decay ** (len(names) - 1 - i) * scale.get(name, 1.0) for i, name in enumerate(names)]


def refuse_few(option: str, stages: Sequence[Stage], least: int) -> None:
    """See that a network has enough stages to freeze some of them.

    Raises:
        ConfigError: It has fewer than `least`.
    """
    if len(stages) < least:
        names = ", ".join(stage.name for stage in stages)
        raise ConfigError(
            f"finetune={option} needs a model of {least} stages or more, this one has {len(stages)} ({names})\n"
            "  use finetune=full, or divide the model yourself by stages=[[MODULE,…],…]"
        )
