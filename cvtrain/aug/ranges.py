"""Ranges of the arguments, and uniform numbers stretched onto them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from cvtrain.errors import ConfigError


def number(name: str, value: float, low: float = 0.0, high: float = math.inf) -> float:
    """Return `value` as a float.

    Raises:
        ConfigError: It is not in `[low, high]`.
    """
    if not low <= value <= high:
        raise ConfigError(f"aug: {name}={value} is out of range\n  allowed: {low:g} to {high:g}")
    return float(value)


def interval(name: str, values: Sequence[float], low: float = 0.0, high: float = math.inf) -> tuple[float, float]:
    """Return `values` as (lower, upper).

    Raises:
        ConfigError: They are not two ascending numbers in `[low, high]`.
    """
    if len(values) != 2 or not low <= values[0] <= values[1] <= high:
        raise ConfigError(
            f"aug: {name}={list(values)} is not a range\n  allowed: [lower, upper] within {low:g} to {high:g}"
        )
    return float(values[0]), float(values[1])


def stretch(uniforms: Tensor, low: float, high: float) -> Tensor:
    """Map numbers uniform in [0, 1) onto [low, high)."""
    return uniforms * (high - low) + low
