"""Which sizes of pictures a network takes, found out by trying."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from cvtrain.core.modes import evaluating
from cvtrain.core.quiet import quiet
from cvtrain.errors import ConfigError, CvtrainError, Interrupted, RefusedError

_SIDES = (
    *(4, 7, 8, 12, 14, 16, 20, 24, 28, 32, 40, 42, 48, 56, 64, 70, 72, 80, 84, 96, 98, 112, 128, 140, 144, 160, 168),
    *(192, 196, 224, 240, 256, 280, 288, 299, 320, 336, 352, 384, 392, 416, 448, 480, 512, 544, 576, 600, 640),
)
"""Sides to try, in pixels: multiples of 4, 7 and 8 lie close together where networks begin to take pictures."""
_PATIENCE_S = 15.0
"""How long a network is tried out, without and then with real weights."""


def sized(make: Callable[[int], nn.Module], in_channels: int, img_size: int, label: str) -> nn.Module:
    """Build a network, and see that it takes the pictures it is built for.

    Args:
        make: Builds it for a side in pixels.
        in_channels: Channels of the pictures.
        img_size: Their side in pixels.
        label: What the network is called, for the error.

    Returns:
        `make(img_size)`; also where it was not the size that it refused, which shows in the first batch.

    Raises:
        ConfigError: It takes pictures, but none of this size; the message says which is the smallest.
    """
    try:
        model = make(img_size)
        reason = refusal(model, (in_channels, img_size, img_size))
        if reason is None:
            return model
    except Exception as error:  # a network raises what it likes
        if isinstance(error, CvtrainError) and not isinstance(error, RefusedError):
            raise
        model, reason = None, error
    sizes = _sizes(make, in_channels, img_size)
    if sizes is None:
        if model is None:
            raise reason
        return model
    smallest, fitting = sizes
    raise ConfigError(
        f"{label} does not take pictures of {img_size} px; the smallest it takes are {smallest} px.\n"
        f"  ({first_line(reason)})\n  Set img_size={fitting}, or choose another model."
    ) from reason


def refusal(model: nn.Module, shape: tuple[int, int, int]) -> Exception | None:
    """Return what `model` raises in evaluation for a black picture of (channels, height, width); None: it takes it."""
    first = next(model.parameters(), torch.empty(0))
    try:
        with evaluating(model), torch.no_grad():
            model(torch.zeros((1, *shape), device=first.device, dtype=first.dtype))
    except Interrupted:
        raise
    except Exception as error:  # a network raises what it likes
        return error
    return None


def _sizes(make: Callable[[int], nn.Module], in_channels: int, img_size: int) -> tuple[int, int] | None:
    """Return the smallest side, and the smallest that is not below `img_size`; None when size is not what matters."""
    # Without content first: that costs neither memory nor arithmetic.
    for device in ("meta", "cpu"):
        takes = _Trial(make, in_channels, device)
        with quiet():
            if takes(img_size):  # the reason is another one, such as too little memory
                return None
            smallest = _first(takes, 0, _SIDES)
            if smallest is None:
                continue
            above = [side for side in _SIDES if side > img_size]
            fitting = smallest if smallest > img_size else _first(takes, img_size, above)
        return smallest, fitting or smallest
    return None


class _Trial:
    """Says whether a network takes pictures of one side, for as long as patience lasts."""

    def __init__(self, make: Callable[[int], nn.Module], in_channels: int, device: str) -> None:
        self._make, self._channels, self._device = make, in_channels, device
        self._deadline = time.monotonic() + _PATIENCE_S

    def __call__(self, side: int) -> bool:
        if time.monotonic() > self._deadline:
            return False
        try:
            with torch.device(self._device):
                model = self._make(side)
        except Interrupted:
            raise
        except Exception:  # a network raises what it likes
            return False
        return refusal(model, (self._channels, side, side)) is None


def _first(takes: Callable[[int], bool], refused: int, sides: Sequence[int]) -> int | None:
    """Return the smallest side above `refused` that is taken, looking between `sides` only below the first of them."""
    for side in sides:
        if takes(side):
            while side - refused > 1:
                middle = (refused + side) // 2
                refused, side = (refused, middle) if takes(middle) else (middle, side)  # noqa: PLW2901 - bisection
            return side
        refused = side
    return None


def first_line(error: BaseException) -> str:
    """Return the beginning of what a network has raised."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
