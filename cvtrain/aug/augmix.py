"""AugMix (Hendrycks et al. 2020, arXiv:1912.02781)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.aug.policies import AUGMIX, AUGMIX_OPERATIONS, choose, plan
from cvtrain.aug.policy_ops import OPERATIONS, Plan, run, to_uint8
from cvtrain.aug.ranges import chunks, number, to_device
from cvtrain.core.types import Draw

DEPTH = 3
"""Operations in the longest chain; a chain's length is 1, 2 or 3, all equally likely."""


class AugMix:
    """Mix a picture with the ends of several random chains of operations.

    The weights of the chains are Dirichlet(1, …, 1), the picture's own share is Beta(1, 1), as in the paper.
    The consistency loss of the paper is not part of it.

    Args:
        severity: The strength of each operation is one of the lowest `severity` of ten levels.
        mixture_width: Chains a picture.
    """

    bins = 10

    def __init__(self, severity: int = 3, mixture_width: int = 3) -> None:
        self.severity = int(number("severity", severity, 1, self.bins))
        self.mixture_width = int(number("mixture_width", mixture_width, 1, 10))

    def plans(self, draw: Draw, size: tuple[int, int]) -> tuple[list[Plan], NDArray[np.float32]]:
        """Draw for pictures of `size` (height, width).

        Returns:
            One plan a chain, and the weights `(B, 1 + mixture_width)` of the picture itself and of the chains.
        """
        width, steps = self.mixture_width, self.mixture_width * DEPTH
        uniforms = draw(1 + 2 * width + 3 * steps).astype(np.float64)
        own, shares, lengths, rest = np.split(uniforms, [1, 1 + width, 1 + 2 * width], axis=1)
        # A Dirichlet of ones is independent exponentials over their sum.
        shares = -np.log1p(-shares) + 1e-12
        weights = np.concatenate([own, (1.0 - own) * shares / shares.sum(axis=1, keepdims=True)], axis=1)
        chances, levels, signs = np.split(rest.reshape(-1, 3 * width, DEPTH), 3, axis=1)
        operations = choose(AUGMIX_OPERATIONS, chances)
        over = np.arange(DEPTH) > choose(np.arange(DEPTH), lengths)[:, :, None]
        operations = np.where(over, OPERATIONS.index("Identity"), operations)
        table = AUGMIX.magnitudes(self.bins, size)
        at = choose(np.arange(self.severity), levels)
        plans = [plan(operations[:, k], at[:, k], signs[:, k].astype(np.float32), table) for k in range(width)]
        return plans, weights.astype(np.float32)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to the same."""
        plans, weights = self.plans(draw, (images.shape[-2], images.shape[-1]))
        chains = [images, *(run(images, each, "bilinear") for each in plans)]
        return mix(chains, to_device(weights, images.device))


def mix(pictures: list[Tensor], weights: Tensor) -> Tensor:
    """Add K times `(B, C, H, W)` uint8 up with `weights` `(B, K)` that sum to 1 a sample; uint8."""
    result = torch.empty_like(pictures[0])
    for part in chunks(result):
        total = torch.zeros_like(result[part], dtype=torch.float32)
        for each, weight in zip(pictures, weights[part].unbind(dim=1), strict=True):
            total.add_(each[part].float().mul_(weight.view(-1, 1, 1, 1)))
        result[part] = to_uint8(total)
    return result
