"""Dropout."""

from __future__ import annotations

import logging

import torch.nn.functional as F
from torch import Tensor, nn

from cvtrain.core.anatomy import classifier
from cvtrain.errors import ConfigError
from cvtrain.regularizer.base import Regularizer

log = logging.getLogger("cvtrain")


class DropInput:
    """Forward pre-hook that drops single elements of a module's input, in training only."""

    def __init__(self, drop_prob: float) -> None:
        self.drop_prob = drop_prob

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return `inputs`, elements of the first zeroed with `drop_prob` and the others scaled by 1/(1-drop_prob)."""
        return (F.dropout(inputs[0], self.drop_prob, module.training), *inputs[1:])


class Dropout(Regularizer):
    """Drop single activations: wherever the network has dropout layers of its own, else before its last layer.

    Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 2014.

    Args:
        drop_prob: Probability in 0..1, the same for all layers.
    """

    def __init__(self, drop_prob: float = 0.2) -> None:
        self.drop_prob = drop_prob

    def attach(self, model: nn.Module, shape: tuple[int, int, int] | None = None) -> None:
        """Set the probability of the network's dropout layers, or hook the layer that gives the logits.

        Raises:
            ConfigError: There is neither.
        """
        own = [module for module in model.modules() if isinstance(module, nn.Dropout)]
        for module in own:
            module.p = self.drop_prob
        if own:
            log.info("dropout: %g in the network's %d dropout layers", self.drop_prob, len(own))
            return
        try:
            path = classifier(model, shape)
        except ConfigError as error:
            raise ConfigError(
                f"regularizer=dropout does not fit this model: {error}\n"
                "Give the network an nn.Dropout of its own, or leave dropout out of regularizer=."
            ) from error
        model.get_submodule(path).register_forward_pre_hook(DropInput(self.drop_prob))
        log.info("dropout: %g before %s, the last layer; the network has no dropout layers", self.drop_prob, path)
