"""Stochastic depth."""

from __future__ import annotations

import logging

from torch import Tensor, nn

from cvtrain.core.anatomy import residual_branches
from cvtrain.errors import ConfigError
from cvtrain.regularizer.base import Regularizer

log = logging.getLogger("cvtrain")


class DropBranch:
    """Forward hook that drops a residual branch's output per sample, in training only."""

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

    def attach(self, model: nn.Module) -> None:
        """Set the rates on the model's own stochastic-depth modules, or hook every residual branch.

        Raises:
            ConfigError: The model has no residual branches.
        """
        from torchvision.ops import StochasticDepth as TorchvisionStochasticDepth

        own = [m for m in model.modules() if isinstance(m, TorchvisionStochasticDepth)]
        if own:
            for i, module in enumerate(own):
                module.p = self.drop_prob * (i + 1) / len(own)
            count = len(own)
        else:
            try:
                ends = residual_branches(model)
            except ConfigError as error:
                raise ConfigError(
                    f"regularizer=stochastic_depth does not fit this model: {error}\n"
                    "Choose a residual model (model=resnet18), or leave stochastic_depth out of regularizer=."
                ) from error
            for i, path in enumerate(ends):
                model.get_submodule(path).register_forward_hook(DropBranch(self.drop_prob * (i + 1) / len(ends)))
            count = len(ends)
        log.info("stochastic depth: %d branches, drop rate %.3f to %.3f", count, self.drop_prob / count, self.drop_prob)
