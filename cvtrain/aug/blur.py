"""Gaussian blur."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cvtrain.aug.planes import on_rows
from cvtrain.aug.ranges import chunks, interval, number, stretch, to_device
from cvtrain.core.types import Draw
from cvtrain.errors import ConfigError


def gaussian_weights(kernel_size: int, sigma: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the half kernel `(n, kernel_size // 2 + 1)`, centre first, for `sigma` `(n,)` in pixels."""
    reach = kernel_size // 2
    weights = np.exp(-0.5 * np.square(np.arange(reach + 1) / sigma.astype(np.float64)[:, None]))
    weights /= 2.0 * weights.sum(axis=1, keepdims=True) - weights[:, :1]
    halves: NDArray[np.float32] = weights.astype(np.float32)
    return halves


def gaussian_blur(images: Tensor, weights: Tensor) -> Tensor:
    """Blur with a kernel a sample, mirrored at the borders.

    Equals torchvision.transforms.v2.functional.gaussian_blur within one level.

    Args:
        images: uint8 `(n, C, H, W)`, H and W above the kernel's reach.
        weights: `(n, reach + 1)` float32, from `gaussian_weights`.

    Returns:
        uint8 `(n, C, H, W)`, contiguous.
    """
    result, reach = torch.empty_like(images, memory_format=torch.contiguous_format), weights.shape[1] - 1
    for part in chunks(images):
        planes = images[part].to(torch.float32, memory_format=torch.contiguous_format)
        planes = F.pad(planes, (reach,) * 4, mode="reflect")
        for dim in (-2, -1):
            planes = _weighted(planes, weights[part], dim)
        result[part] = planes.add_(0.5).to(torch.int16)
    return result


def _weighted(planes: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Return float planes, shorter by the kernel's reach at both ends of `dim`."""
    reach = weights.shape[1] - 1
    length = planes.shape[dim] - 2 * reach
    each = weights.view(-1, reach + 1, 1, 1, 1).unbind(dim=1)
    total = planes.narrow(dim, reach, length) * each[0]
    for distance in range(1, reach + 1):
        pair = planes.narrow(dim, reach - distance, length) + planes.narrow(dim, reach + distance, length)
        total.add_(pair.mul_(each[distance]))
    return total


class GaussianBlur:
    """Blur at random.

    Args:
        kernel_size: Side of the kernel in pixels, odd.
        sigma: Its standard deviation in pixels is uniform in this range.
        prob: Share of the pictures that are blurred.
    """

    def __init__(self, kernel_size: int = 3, sigma: Sequence[float] = (0.1, 2.0), prob: float = 0.5) -> None:
        if kernel_size != int(kernel_size) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(f"aug: kernel_size={kernel_size} is not an odd whole number above 0; try 3, 5 or 7")
        self.kernel_size = int(kernel_size)
        self.sigma = interval("sigma", sigma, 1e-3)
        self.prob = number("prob", prob, 0, 1)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to the same.

        Raises:
            ConfigError: The kernel reaches beyond the picture.
        """
        side = min(images.shape[-2:])
        if self.kernel_size // 2 >= side:
            raise ConfigError(
                f"aug: kernel_size={self.kernel_size} is too large for pictures of {side} pixels\n"
                f"  allowed: up to {2 * side - 1}"
            )
        uniforms = draw(2)
        rows = np.flatnonzero(uniforms[:, 0] < self.prob)
        weights = gaussian_weights(self.kernel_size, stretch(uniforms[rows, 1], *self.sigma))
        sent = to_device(weights, images.device)
        return on_rows(images, rows, lambda chosen: gaussian_blur(chosen, sent))
