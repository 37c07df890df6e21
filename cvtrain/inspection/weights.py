"""How the weights of each layer are distributed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

NEAR_ZERO = 0.01
"""Share of a tensor's largest magnitude up to which a weight counts as near zero."""
REACH = 4.0
"""Standard deviations to each side of zero that a histogram reaches; what lies beyond is in its first and last bin."""
BINS = 81
"""An odd number, so that exact zeros have a bin in the middle."""


@dataclass(frozen=True)
class Weights:
    """The weights of one parameter.

    Attributes:
        name: As in `named_parameters()`.
        kind: Class of its module.
        shape: Of the tensor.
        mean: Of its values.
        std: Their standard deviation.
        lowest: The smallest value.
        highest: The largest value.
        near_zero: Share of them of at most a hundredth of the largest magnitude, 0..1.
        histogram: `(81,)` shares of them in bins from -4 to 4 standard deviations around zero.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    mean: float
    std: float
    lowest: float
    highest: float
    near_zero: float
    histogram: NDArray[np.float64]

    @property
    def count(self) -> int:
        """Return how many values there are."""
        return int(np.prod(self.shape))


def weight_statistics(model: nn.Module) -> list[Weights]:
    """Return the statistics of each parameter of `model` that is not empty, as they are written down."""
    found = []
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            continue
        values = parameter.detach().float().cpu().numpy().ravel().astype(np.float64)
        std, largest = float(values.std()), float(np.abs(values).max())
        scaled = np.clip(values / std, -REACH, REACH) if std else np.zeros_like(values)
        histogram = np.histogram(scaled, BINS, (-REACH, REACH))[0] / len(values)
        found.append(
            Weights(
                name,
                type(model.get_submodule(name.rpartition(".")[0])).__name__,
                tuple(parameter.shape),
                float(values.mean()),
                std,
                float(values.min()),
                float(values.max()),
                float((np.abs(values) <= NEAR_ZERO * largest).mean()),
                histogram,
            )
        )
    return found
