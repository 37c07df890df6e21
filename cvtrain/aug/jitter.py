"""Colour: brightness, contrast, saturation, hue.

Each function equals its namesake in torchvision.transforms.v2.functional for equal parameters, but takes one
parameter a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cvtrain.aug.ranges import number, stretch
from cvtrain.core.types import Draw

# ITU-R BT.601 luma.
_LUMA = (0.2989, 0.587, 0.114)


def _blend(images: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    factor = factor.view(-1, 1, 1, 1)
    return (images * factor + other * (1.0 - factor)).clamp(0.0, 1.0)


def _grey(images: Tensor) -> Tensor:
    """Return `(B, 1, H, W)`: luma of RGB, else the mean of the channels."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    red, green, blue = images.unbind(dim=1)
    return (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]).unsqueeze(1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply float `(B, C, H, W)` in 0..1 by `factor` `(B,)`, 0 or more."""
    return (images * factor.view(-1, 1, 1, 1)).clamp(0.0, 1.0)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Stretch float `(B, C, H, W)` in 0..1 about each picture's mean grey by `factor` `(B,)`, 0 or more."""
    return _blend(images, _grey(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Stretch RGB float `(B, 3, H, W)` in 0..1 about each pixel's grey by `factor` `(B,)`; 0 makes it grey."""
    return _blend(images, _grey(images), factor)


def adjust_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of RGB float `(B, 3, H, W)` in 0..1.

    Args:
        images: The pictures.
        turn: `(B,)` in -0.5..0.5, in whole turns of the HSV colour circle.

    Returns:
        Float `(B, 3, H, W)` in 0..1.
    """
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    safe = torch.where(chroma == 0, 1.0, chroma)
    red, green, blue = images.unbind(dim=1)
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2.0, (red - green) / safe + 4.0),
    )
    sixths = sixths + 6.0 * turn.view(-1, 1, 1)
    channels = []
    # A channel of HSV is value - chroma · max(0, min(k, 4 - k, 1)), k the hue in sixths seen from that channel.
    for origin in (5.0, 3.0, 1.0):
        k = (sixths + origin).remainder(6.0)
        channels.append(value - chroma * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0))
    return torch.stack(channels, dim=1)


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
        """Map float `(B, C, H, W)` in 0..1 to the same."""
        uniforms = draw(4)
        if self.brightness:
            images = adjust_brightness(images, _factor(uniforms[:, 0], self.brightness))
        if self.contrast:
            images = adjust_contrast(images, _factor(uniforms[:, 1], self.contrast))
        if self.saturation and images.shape[1] == 3:
            images = adjust_saturation(images, _factor(uniforms[:, 2], self.saturation))
        if self.hue and images.shape[1] == 3:
            images = adjust_hue(images, stretch(uniforms[:, 3], -self.hue, self.hue))
        return images


def _factor(uniforms: Tensor, strength: float) -> Tensor:
    return stretch(uniforms, max(0.0, 1.0 - strength), 1.0 + strength)
