"""The MLP head, for any network."""

from __future__ import annotations

import logging

from torch import nn

from cvtrain.core.anatomy import classifier, replace_module
from cvtrain.core.dataflow import dataflow

log = logging.getLogger("cvtrain")

HIDDEN = 512
"""Units between the features and the logits."""


class MLPHead(nn.Sequential):
    """Dropout 0.5, 512 units, ReLU, dropout 0.3 and the logits."""

    def __init__(self, hidden: nn.Module, logits: nn.Module) -> None:
        super().__init__(nn.Dropout(0.5), hidden, nn.ReLU(inplace=True), nn.Dropout(0.3), logits)


def put_mlp_head(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Put an `MLPHead` in the place of the layer that gives the logits.

    Where that layer is a convolution, so are the two of the head. A dropout layer right before it goes, as the head
    has its own.

    Args:
        model: A classifier, changed in place.
        shape: Channels, height and width that it takes.

    Raises:
        ConfigError: The model cannot be followed from pictures to logits, or has no such layer.
    """
    path = classifier(model, shape)
    last = model.get_submodule(path)
    if isinstance(last, nn.Conv2d):
        inputs = last.in_channels
        hidden: nn.Module = nn.Conv2d(inputs, HIDDEN, last.kernel_size, last.stride, last.padding)  # type: ignore[arg-type]
        head = MLPHead(hidden, nn.Conv2d(HIDDEN, last.out_channels, 1))
    elif isinstance(last, nn.Linear):
        inputs = last.in_features
        head = MLPHead(nn.Linear(inputs, HIDDEN), nn.Linear(HIDDEN, last.out_features))
    else:
        raise TypeError(f"a classifier of type {type(last).__name__}")
    calls = dataflow(model, shape).calls
    before = calls[calls.index(path) - 1]
    if isinstance(model.get_submodule(before), nn.Dropout):
        replace_module(model, before, nn.Identity())
    replace_module(model, path, head)
    log.info("head: MLP of %d units on %d features, in place of %s", HIDDEN, inputs, path)
