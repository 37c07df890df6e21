"""Stochastic depth."""

from __future__ import annotations

import logging

from torch import Tensor, nn

from cvtrain.core.anatomy import residual_branches
from cvtrain.errors import ConfigError
from cvtrain.regularizer.base import Regularizer

log = logging.getLogger("cvtrain")

OWN_RATES = {"StochasticDepth": "p", "DropPath": "drop_prob"}
"""Class and rate of the modules that do the same in torchvision's and timm's networks."""


class DropBranch:
    """Forward hook that drops a residual branch's output per sample, while the module that ends the branch trains.

    Finetuning puts frozen stages into evaluation: as with a network's own stochastic depth, their branches stay.

    Args:
        drop_prob: Probability in 0..1.
    """

    def __init__(self, drop_prob: float) -> None:
        self.drop_prob = drop_prob

    def __call__(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        """Return `output` with whole samples zeroed with `drop_prob` and the others scaled by 1/(1-drop_prob)."""
        from torchvision.ops import stochastic_depth

        result: Tensor = stochastic_depth(output, self.drop_prob, "row", training=module.training)
        return result


class StochasticDepth(Regularizer):
    """Drop branch l of L with probability `drop_prob · l/L`, for each sample of its own.

    Source: Huang et al., "Deep networks with stochastic depth", ECCV 2016, the linear rule.

    Args:
        drop_prob: Probability for the last branch, in 0..1.
    """

    def __init__(self, drop_prob: float = 0.1) -> None:
        self.drop_prob = drop_prob

    def attach(self, model: nn.Module, shape: tuple[int, int, int] | None = None) -> None:
        """Hook every residual branch, at our rates; stochastic depth that the network has of its own rests.

        Raises:
            ConfigError: The model has no residual branches.
        """
        try:
            ends = residual_branches(model, shape)
        except ConfigError as error:
            raise ConfigError(
                f"regularizer=stochastic_depth does not fit this model: {error}\n"
                "Choose a residual model (model=resnet18), or leave stochastic_depth out of regularizer=."
            ) from error
        for module in model.modules():
            if type(module).__name__ in OWN_RATES:
                setattr(module, OWN_RATES[type(module).__name__], 0.0)
        count = len(ends)
        for i, path in enumerate(ends):
            model.get_submodule(path).register_forward_hook(DropBranch(self.drop_prob * (i + 1) / count))
        rates = [f"{name} {self.drop_prob * (i + 1) / count:.3f}" for i, name in enumerate(_short(ends))]
        log.info("stochastic depth: %d branch%s, drop rate: %s", count, "" if count == 1 else "es", ", ".join(rates))


def _short(paths: list[str]) -> list[str]:
    """Return paths without the parts that all of them begin or end with."""
    parts = [path.split(".") for path in paths]
    first, last = min(parts), max(parts)
    shared = min(len(each) for each in parts) - 1
    begin = next((i for i in range(shared) if first[i] != last[i]), shared)
    end = next((i for i in range(shared - begin) if len({each[-1 - i] for each in parts}) > 1), shared - begin)
    return [".".join(each[begin : len(each) - end]) for each in parts]


def drop_rates(model: nn.Module) -> dict[str, float]:
    """Return the drop probability of each residual branch by the path of the module that ends it, lowest first."""
    rates = {
        path: hook.drop_prob
        for path, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, DropBranch)
    }
    return dict(sorted(rates.items(), key=lambda item: item[1]))
