"""Noise that is a pure function of a key a sample: the same to the bit on a CPU and on a GPU.

A pixel's random number is a hash of the sample's key and the pixel's position, in whole numbers; no generator is asked.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.aug.planes import on_rows
from cvtrain.aug.ranges import chunks, number, to_device
from cvtrain.core.types import Draw

_FINE = 2**16
"""Quantiles of the normal distribution that are told apart; the outermost are ±4.3 standard deviations."""


def hashed(keys: Tensor, count: int) -> Tensor:
    """Return random bits.

    Two rounds of the 32-bit mixer of C. Wellons' hash prospector ("lowbias32", public domain), one half of the key
    before each.

    Args:
        keys: `(n, 2)` int32.
        count: How many numbers a sample.

    Returns:
        `(n, count)` int32, all 32 bits random.
    """
    bits = torch.arange(count, device=keys.device, dtype=torch.int32)
    for half in (keys[:, 0:1], keys[:, 1:2]):
        bits = _mixed(bits ^ half)
    return bits


def _mixed(bits: Tensor) -> Tensor:
    # int32 shifts carry the sign along; the mask takes it off again.
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - 2**32)
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def keys_from(uniforms: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return `(n, 2)` keys of 2 · 24 bits from `(n, 2)` numbers in [0, 1) of 24 bits each."""
    return (uniforms * np.float32(2**24)).astype(np.int32)


class GaussianNoise:
    """Add normal noise to each channel of each pixel, rounded to whole levels and cut off at 0 and 255.

    Args:
        noise_mean: Mean of the noise, of levels in 0..1.
        noise_sigma: Its standard deviation, of levels in 0..1.
        prob: Share of the pictures that get noise.
    """

    def __init__(self, noise_mean: float = 0.0, noise_sigma: float = 0.1, prob: float = 0.5) -> None:
        self.noise_mean = number("noise_mean", noise_mean, -1, 1)
        self.noise_sigma = number("noise_sigma", noise_sigma, 0, 1)
        self.prob = number("prob", prob, 0, 1)
        quantiles = torch.special.ndtri((torch.arange(_FINE, dtype=torch.float64) + 0.5) / _FINE)
        self._levels = (255.0 * (self.noise_mean + self.noise_sigma * quantiles)).round().to(torch.int16)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to the same."""
        uniforms = draw(3)
        rows = np.flatnonzero(uniforms[:, 0] < self.prob)
        keys = to_device(keys_from(uniforms[rows, 1:]), images.device)
        self._levels = self._levels.to(images.device)
        return on_rows(images, rows, lambda chosen: self._noisy(chosen, keys))

    def _noisy(self, images: Tensor, keys: Tensor) -> Tensor:
        for part in chunks(images):
            size = images[part].shape
            values = size[1:].numel()
            # Each hash holds two numbers of 16 bits.
            bits = hashed(keys[part], (values + 1) // 2)
            index = torch.cat([bits & 0xFFFF, (bits >> 16) & 0xFFFF], dim=1)[:, :values]
            noise = self._levels.index_select(0, index.flatten()).view(size)
            images[part] = noise.add_(images[part]).clamp_(0, 255).to(torch.uint8)
        return images


class SaltAndPepper:
    """Turn single pixels white or black, in all channels at once.

    Args:
        amount: Share of the pixels that are changed, half of them white.
        prob: Share of the pictures that are changed.
    """

    def __init__(self, amount: float = 0.05, prob: float = 0.5) -> None:
        self.amount = number("amount", amount, 0, 1)
        self.prob = number("prob", prob, 0, 1)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to the same."""
        uniforms = draw(3)
        rows = np.flatnonzero(uniforms[:, 0] < self.prob)
        keys = to_device(keys_from(uniforms[rows, 1:]), images.device)
        return on_rows(images, rows, lambda chosen: self._spotted(chosen, keys))

    def _spotted(self, images: Tensor, keys: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        for part in chunks(images):
            # The lowest bit is the colour, the others the chance.
            bits = hashed(keys[part], height * width).view(-1, 1, height, width)
            chance = (bits >> 1) & 0x7FFFFFFF
            hit = chance <= round(self.amount * 2**31) - 1
            images[part] = torch.where(hit, ((bits & 1) * 255).to(torch.uint8), images[part])
        return images
