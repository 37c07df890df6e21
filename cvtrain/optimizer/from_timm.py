"""Optimizers of timm, the extra `timm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from cvtrain.core.extras import import_extra


def lion(params: Any, lr: float, betas: Sequence[float], weight_decay: float) -> Optimizer:  # noqa: ANN401 - as torch's
    """Return timm's Lion: each step has the size `lr`, its direction the sign of a momentum.

    Source: Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023, arXiv:2302.06675.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate, a third to a tenth of AdamW's.
        betas: How much of the momentum the step takes, and how much of it stays.
        weight_decay: Decoupled, 3 to 10 times AdamW's.

    Raises:
        ConfigError: timm is not installed.
    """
    optimizer: Optimizer = import_extra("timm.optim", "optimizer=lion", "timm").Lion(
        params, lr=lr, betas=tuple(betas), weight_decay=weight_decay
    )
    return optimizer


def muon(
    params: Any,  # noqa: ANN401 - as torch's
    lr: float,
    momentum: float,
    nesterov: bool,
    betas: Sequence[float],
    weight_decay: float,
) -> Optimizer:
    """Return timm's Muon: momentum made orthogonal, and AdamW for what is no matrix.

    A convolution's weights count as the matrix (outputs, inputs · height · width). Norms, biases, depthwise
    convolutions and tokens go to AdamW (NAdamW with `nesterov`); steps are scaled to the size of AdamW's, so that one
    learning rate serves both (Liu et al., "Muon is scalable for LLM training", arXiv:2502.16982).

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate of both.
        momentum: Of the matrices.
        nesterov: Whether to look ahead.
        betas: AdamW's.
        weight_decay: Decoupled.

    Raises:
        ConfigError: timm is not installed.
    """
    library = import_extra("timm.optim", "optimizer=muon", "timm")
    optimizer: Optimizer = library.Muon(
        params, lr=lr, momentum=momentum, nesterov=nesterov, betas=tuple(betas), weight_decay=weight_decay
    )
    return optimizer
