"""How alike two small grey pictures are once a slight crop or stretch between them is undone.

The alignment is Lucas & Kanade's ("An iterative image registration technique", IJCAI 1981) with scale and shift along
each axis, the gradient taken of the picture that stays (Baker & Matthews, "Lucas-Kanade 20 years on", IJCV 2004).
Coarse structure is common to many pictures and fine structure is lost in compression, so that the comparison weighs
frequencies by a band between them.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

ITERATIONS = 5
LIMIT = 0.1
"""Largest scale and shift that is undone, as a share of half a side: crops of 5 % need 0.05 of the side."""
_MARGIN = 2
_CUTOFF = 11.0


def residuals(fixed: Tensor, moving: Tensor) -> Tensor:
    """Return how much of `moving`, laid over `fixed`, is left unexplained.

    Args:
        fixed: Float `(P, S, S)`.
        moving: Float `(P, S, S)`; it may be moved and stretched a little, brighter, or of more contrast.

    Returns:
        Float `(P,)`: 1 minus the correlation of both in the band; 0 for the same picture, about 1 for unrelated ones.
    """
    laid = _warp(moving, _alignment(fixed, moving))
    return 1 - (_unit(_band(fixed)) * _unit(_band(laid))).sum((1, 2))


def cosine_basis(side: int) -> NDArray[np.float32]:
    """Return the orthonormal type-II discrete cosine basis, `(side, side)`, a row a frequency."""
    rows, columns = np.arange(side)[:, None], np.arange(side)[None, :]
    basis = np.sqrt(2 / side) * np.cos(np.pi * (2 * columns + 1) * rows / (2 * side))
    basis[0] /= np.sqrt(2)
    return np.asarray(basis, np.float32)


def _alignment(fixed: Tensor, moving: Tensor) -> Tensor:
    """Return `(P, 4)` scales and shifts along x and y by which `moving` comes to lie on `fixed`."""
    count, side, _ = fixed.shape
    still = _unit(fixed)
    scaled = fixed / _inside(fixed).std((1, 2), keepdim=True).clamp_min(1e-6) / (side - 2 * _MARGIN)
    along_x, along_y = torch.zeros_like(fixed), torch.zeros_like(fixed)
    along_x[:, :, 1:-1] = (scaled[:, :, 2:] - scaled[:, :, :-2]) * (side / 4)
    along_y[:, 1:-1, :] = (scaled[:, 2:, :] - scaled[:, :-2, :]) * (side / 4)
    axis = _axis(side)
    slopes = torch.stack([along_x * axis, along_y * axis[:, None], along_x, along_y], 1)
    slopes = _inside(slopes).reshape(count, 4, -1)
    normal = slopes @ slopes.transpose(1, 2)
    # Damped, for pictures that vary along one axis only.
    damping = 1e-2 * normal.diagonal(dim1=1, dim2=2).mean(1) + 1e-8
    inverse = torch.linalg.inv(normal + torch.eye(4) * damping[:, None, None])
    found = torch.zeros(count, 4)
    for _ in range(ITERATIONS):
        left = (still - _unit(_warp(moving, found))).reshape(count, -1, 1)
        found = (found + (inverse @ (slopes @ left))[..., 0]).clamp(-LIMIT, LIMIT)
    return found


def _warp(images: Tensor, by: Tensor) -> Tensor:
    count, side, _ = images.shape
    axis = _axis(side)
    x = (1 + by[:, :1]) * axis + by[:, 2:3]
    y = (1 + by[:, 1:2]) * axis + by[:, 3:4]
    grid = torch.stack([x[:, None, :].expand(count, side, side), y[:, :, None].expand(count, side, side)], -1)
    laid: Tensor = grid_sample(images[:, None], grid, padding_mode="border", align_corners=False)
    return laid[:, 0]


def _band(images: Tensor) -> Tensor:
    side = images.shape[-1]
    basis = torch.from_numpy(cosine_basis(side))
    radius = torch.arange(side).float().square()
    radius = (radius[:, None] + radius[None, :]).sqrt()
    weighed: Tensor = (basis @ images @ basis.T) * radius * torch.exp(-((radius / _CUTOFF) ** 2))
    back: Tensor = basis.T @ weighed
    filtered: Tensor = back @ basis
    return filtered


def _unit(images: Tensor) -> Tensor:
    """Return the inner part, of mean 0 and length 1."""
    inner = _inside(images)
    inner = inner - inner.mean((1, 2), keepdim=True)
    length: Tensor = inner.flatten(1).norm(dim=1)
    return inner / length.clamp_min(1e-6)[:, None, None]


def _inside(images: Tensor) -> Tensor:
    """Leave out the border, into which a warp moves what neither picture holds."""
    return images[..., _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]


def _axis(side: int) -> Tensor:
    return (torch.arange(side) + 0.5) * (2 / side) - 1
