"""A change of the point of view."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cvtrain.aug.planes import on_rows
from cvtrain.aug.ranges import chunks, number, to_device
from cvtrain.core.types import Draw


def perspective(images: Tensor, coefficients: Tensor) -> Tensor:
    """Resample by a projective map, bilinearly; what comes from outside is 0.

    Equals torchvision.transforms.v2.functional.perspective within one level.

    Args:
        images: uint8 `(n, C, H, W)`.
        coefficients: `(n, 8)` float32 [a, b, c, d, e, f, g, h]: output (x, y), in pixels from the top left corner,
            shows input ((ax + by + c) / (gx + hy + 1), (dx + ey + f) / (gx + hy + 1)).

    Returns:
        uint8 `(n, C, H, W)`, contiguous.
    """
    height, width = images.shape[-2:]
    x = (torch.arange(width, device=images.device, dtype=torch.float32) + 0.5).view(1, 1, -1)
    y = (torch.arange(height, device=images.device, dtype=torch.float32) + 0.5).view(1, -1, 1)
    result = torch.empty_like(images, memory_format=torch.contiguous_format)
    for part in chunks(images):
        a, b, c, d, e, f, g, h = coefficients[part].view(-1, 8, 1, 1).unbind(dim=1)
        below = g * x + (h * y + 1.0)
        grid = torch.stack(
            [(a * x + (b * y + c)) / below * (2.0 / width) - 1.0, (d * x + (e * y + f)) / below * (2.0 / height) - 1.0],
            dim=-1,
        )
        planes = images[part].to(torch.float32, memory_format=torch.contiguous_format)
        planes = F.grid_sample(planes, grid, mode="bilinear", align_corners=False)
        result[part] = planes.round_().clamp_(max=255).to(torch.int16)
    return result


def coefficients_of(corners: NDArray[np.float64], height: int, width: int) -> NDArray[np.float32]:
    """Return the map that brings the corners of a picture to `corners`.

    Args:
        corners: `(n, 4, 2)` (x, y) in pixels: where top left, top right, bottom right and bottom left end up.
        height: In pixels.
        width: In pixels.

    Returns:
        `(n, 8)` as `perspective` takes them; the identity where the corners span no area.
    """
    (x, y), (right, bottom) = np.moveaxis(corners, -1, 0), (width - 1.0, height - 1.0)
    zero, one = np.zeros_like(x), np.ones_like(x)
    source_x, source_y = np.array([0.0, right, right, 0.0]), np.array([0.0, 0.0, bottom, bottom])
    upper = np.stack([x, y, one, zero, zero, zero, -source_x * x, -source_x * y], axis=-1)
    lower = np.stack([zero, zero, zero, x, y, one, -source_y * x, -source_y * y], axis=-1)
    matrix = np.concatenate([upper, lower], axis=1)
    values = np.broadcast_to(np.concatenate([source_x, source_y]), (len(corners), 8))[..., None]
    # Unless every three corners span an area, the equations have no one solution; det finds the rest of such cases,
    # with the very steps that solve takes.
    flat = np.linalg.det(matrix) == 0
    for k in range(4):
        first, middle, last = corners[:, k], corners[:, (k + 1) % 4], corners[:, (k + 2) % 4]
        one_way, other = middle - first, last - first
        flat |= one_way[:, 0] * other[:, 1] == one_way[:, 1] * other[:, 0]
    matrix[flat] = np.eye(8)
    solved = np.linalg.solve(matrix, values)[..., 0]
    solved[flat] = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    return solved.astype(np.float32)


class Perspective:
    """Move each corner inwards at random and draw the picture into them.

    Args:
        distortion_scale: A corner moves by a whole number of pixels, uniform up to this share of half the side.
        prob: Share of the pictures that are changed.
    """

    def __init__(self, distortion_scale: float = 0.5, prob: float = 0.5) -> None:
        self.distortion_scale = number("distortion_scale", distortion_scale, 0, 1)
        self.prob = number("prob", prob, 0, 1)

    def corners(self, uniforms: NDArray[np.float32], height: int, width: int) -> NDArray[np.float64]:
        """Return `(n, 4, 2)` as `coefficients_of` takes them, for `(n, 8)` in [0, 1)."""
        reach = [int(self.distortion_scale * (side // 2)) + 1 for side in (width, height)]
        moves = np.floor(uniforms.reshape(-1, 4, 2).astype(np.float64) * reach)
        right, bottom = width - 1.0, height - 1.0
        base = np.array([[0.0, 0.0], [right, 0.0], [right, bottom], [0.0, bottom]])
        inwards = np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
        corners: NDArray[np.float64] = base + inwards * moves
        return corners

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to the same."""
        uniforms, (height, width) = draw(9), images.shape[-2:]
        rows = np.flatnonzero(uniforms[:, 0] < self.prob)
        coefficients = coefficients_of(self.corners(uniforms[rows, 1:], height, width), height, width)
        sent = to_device(coefficients, images.device)
        return on_rows(images, rows, lambda chosen: perspective(chosen, sent))
