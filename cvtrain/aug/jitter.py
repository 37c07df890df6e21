"""Colour: brightness, contrast, saturation, hue.

Each function equals its namesake in torchvision.transforms.v2.functional for equal parameters within one level of
0..255 (it rounds where that truncates), but takes one parameter a sample.

The arithmetic is in float on planes `(B, C, H, W)` in 0..255 whose memory order is channel by channel, in chunks that
stay in a CPU's cache, and is free of fused steps, so that no result depends on the batch, the chunk or the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.aug.ranges import chunks, number, planes_of, store, stretch, to_device
from cvtrain.core.types import Draw

Factors = NDArray[np.float32]
Step = tuple[Callable[[Tensor, Tensor], Tensor], Factors]
"""A function of planes and parameters, and the parameters: `(B,)` or `(B, C)`."""

# ITU-R BT.601 luma.
_LUMA = (0.2989, 0.587, 0.114)

# Cyan, magenta and yellow on a colour circle of six with green at 0: opposite red, green and blue.
_OPPOSITE = np.array([1.0, 3.0, -1.0], dtype=np.float32)


def adjust_brightness(images: Tensor, factor: Factors) -> Tensor:
    """Multiply uint8 `(B, C, H, W)` by `factor` `(B,)`, 0 or more; in place."""
    return adjust(images, [(_brightness, factor)])


def adjust_contrast(images: Tensor, factor: Factors) -> Tensor:
    """Stretch uint8 `(B, C, H, W)` about each picture's mean grey by `factor` `(B,)`, 0 or more; in place."""
    return adjust(images, [(_contrast, factor)])


def adjust_saturation(images: Tensor, factor: Factors) -> Tensor:
    """Stretch RGB uint8 `(B, 3, H, W)` about each pixel's grey by `factor` `(B,)`; 0 makes it grey; in place."""
    return adjust(images, [(_saturation, factor)])


def adjust_hue(images: Tensor, turn: Factors) -> Tensor:
    """Turn the hue of RGB uint8 `(B, 3, H, W)` by `turn` `(B,)`, -0.5..0.5 of the HSV colour circle; in place."""
    return adjust(images, [(_hue, _places(turn))])


def adjust(images: Tensor, steps: Sequence[Step]) -> Tensor:
    """Apply steps one after the other, rounding once at the end; in place."""
    parameters = [to_device(values, images.device).view(len(images), -1, 1, 1) for _, values in steps]
    for part in chunks(images):
        planes = planes_of(images[part])
        for (function, _), values in zip(steps, parameters, strict=True):
            planes = function(planes, values[part])
        store(planes, images[part])
    return images


def _brightness(planes: Tensor, factor: Tensor) -> Tensor:
    # Whole levels, so that the sum that contrast may take next is exact in any order.
    return planes.mul_(factor).round_().clamp_(0.0, 255.0)


def _contrast(planes: Tensor, factor: Tensor) -> Tensor:
    means = planes.sum(dim=(2, 3), keepdim=True) / (planes.shape[-2] * planes.shape[-1])
    grey = _grey(means) if planes.shape[1] == 3 else means.mean(dim=1, keepdim=True)
    return planes.mul_(factor).add_(grey * (1.0 - factor)).clamp_(0.0, 255.0)


def _saturation(planes: Tensor, factor: Tensor) -> Tensor:
    # A whole level, as in torchvision.
    grey = _grey(planes).floor_().mul_(1.0 - factor)
    return planes.mul_(factor).add_(grey).clamp_(0.0, 255.0)


def _grey(planes: Tensor) -> Tensor:
    """Return the luma `(B, 1, H, W)` of RGB."""
    grey = planes[:, 0:1] * _LUMA[0]
    for channel in (1, 2):
        grey = grey.add_(planes[:, channel : channel + 1] * _LUMA[channel])
    return grey


def _places(turn: Factors) -> Factors:
    """Return where on the unturned circle `_OPPOSITE` comes to lie: `(B, 3)` in -3..3."""
    places: Factors = np.remainder(_OPPOSITE - np.float32(6.0) * turn[:, None] + np.float32(3.0), np.float32(6.0))
    return places - np.float32(3.0)


def _hue(planes: Tensor, places: Tensor) -> Tensor:
    """Turn the hue.

    A channel of HSV is value - chroma · clamp(2 - d, 0, 1) with d the distance on the circle of six between the hue
    and the channel's opposite. With both in -3..3, 2 - d is ||hue - opposite| - 3| - 1: no remainder is needed. Nor
    are the cases of the textbook: chroma times the hue's distance from green is red + blue - green + value - 2 least.
    """
    red, green, blue = planes.unbind(dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    from_green = (red + blue).sub_(green).add_(value).sub_(least.mul_(2.0))
    hue = torch.copysign(from_green, blue - red).div_(chroma.clamp(min=1e-6))
    weight = torch.sub(hue.unsqueeze(1), places, out=planes).abs_().sub_(3.0).abs_().clamp_(1.0, 2.0).sub_(1.0)
    return torch.sub(value.unsqueeze(1), weight.mul_(chroma.unsqueeze(1)), out=planes)


class ColorJitter:
    """Change brightness, contrast, saturation and hue at random, always in this order.

    torchvision permutes the four; a fixed order is the same set of operations and treats the whole batch at once.
    Saturation and hue exist for 3 channels only and leave other pictures alone.

    Args:
        brightness: The factor is uniform in [max(0, 1 - b), 1 + b].
        contrast: The same.
        saturation: The same.
        hue: The turn of the colour circle is uniform in ±hue, at most 0.5.
    """

    def __init__(
        self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0
    ) -> None:
        self.brightness = number("brightness", brightness)
        self.contrast = number("contrast", contrast)
        self.saturation = number("saturation", saturation)
        self.hue = number("hue", hue, 0, 0.5)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to the same."""
        uniforms = draw(4)
        steps: list[Step] = []
        if self.brightness:
            steps.append((_brightness, _factor(uniforms[:, 0], self.brightness)))
        if self.contrast:
            steps.append((_contrast, _factor(uniforms[:, 1], self.contrast)))
        if self.saturation and images.shape[1] == 3:
            steps.append((_saturation, _factor(uniforms[:, 2], self.saturation)))
        if self.hue and images.shape[1] == 3:
            steps.append((_hue, _places(stretch(uniforms[:, 3], -self.hue, self.hue))))
        return adjust(images, steps) if steps else images


def _factor(uniforms: Factors, strength: float) -> Factors:
    return stretch(uniforms, max(0.0, 1.0 - strength), 1.0 + strength)
