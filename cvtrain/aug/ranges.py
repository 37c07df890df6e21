"""Ranges of the arguments, uniform numbers stretched onto them, and their way to the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.errors import ConfigError

CACHED_PIXELS = 2**16
"""Pixels whose float planes about fill a CPU core's second-level cache; with fewer, calls cost more than memory."""
BATCHED_PIXELS = 2**24
"""Pixels whose float planes are a small share of a GPU's memory."""


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


def stretch(uniforms: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    """Map numbers uniform in [0, 1) onto [low, high)."""
    return uniforms * np.float32(high - low) + np.float32(low)


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Send parameters to where the pictures are; the host never waits for a GPU."""
    tensor = torch.from_numpy(values)
    # A copy from pageable memory would make it wait.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def chunks(images: Tensor) -> Iterator[slice]:
    """Cut a batch `(B, C, H, W)` into slices for operations that work on float copies of it."""
    pixels = CACHED_PIXELS if images.device.type == "cpu" else BATCHED_PIXELS
    count = max(1, pixels // (images.shape[-2] * images.shape[-1]))
    return (slice(first, first + count) for first in range(0, len(images), count))


def pixels_of(images: Tensor) -> NDArray[np.uint8]:
    """Return a CPU's pictures `(B, C, H, W)`, whatever their strides, as a `(B, H, W, C)` view of the same memory."""
    view: NDArray[np.uint8] = images.permute(0, 2, 3, 1).numpy()
    return view


def planes_of(images: Tensor) -> Tensor:
    """Copy uint8 `(B, C, H, W)` to float of the same shape whose memory order is channel by channel."""
    by_channel = images.transpose(0, 1)
    if images.device.type == "cpu":
        # NumPy is quicker than torch at taking interleaved bytes apart, and at putting them together in `store`.
        return torch.from_numpy(np.ascontiguousarray(by_channel.numpy()).astype(np.float32)).transpose(0, 1)
    return torch.empty(by_channel.shape, device=images.device).copy_(by_channel).transpose(0, 1)


def store(values: Tensor, images: Tensor) -> None:
    """Write float `values` in 0..255 into uint8 `images`, both `(B, C, H, W)`, rounded; `values` is used up."""
    values.add_(0.5)
    if images.device.type != "cpu":
        images.copy_(values)
        return
    levels, target = values.numpy().astype(np.uint8), images.numpy()
    for channel in range(images.shape[1]):
        target[:, channel] = levels[:, channel]
