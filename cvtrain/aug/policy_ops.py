"""The pixel operations of the augmentation policies, each sample with its own operation and strength.

Every function maps uint8 `(n, C, H, W)` to the same and is, for equal parameters, within one level of its namesake in
torchvision.transforms.v2.functional. `run` sorts a batch by operation on the host, so that each function sees its
samples as one slice; it is quickest on contiguous planes, and `run` lays the batch out so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cvtrain.aug.grey import luma
from cvtrain.aug.planes import copy_pixels
from cvtrain.aug.ranges import chunks, to_device

OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
    "Invert",
)
"""Names as in Cubuk et al. 2019; a plan holds positions in this tuple."""

GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_FACTORS = ("Brightness", "Color", "Contrast", "Sharpness")
_PLACE = {name: place for place, name in enumerate(OPERATIONS)}
# From a magnitude to the parameter of an operation that is not geometric.
_SCALE = np.where(np.isin(OPERATIONS, "Solarize"), 255.0, 1.0)
_OFFSET = np.where(np.isin(OPERATIONS, _FACTORS), 1.0, 0.0)
_BLOCK = 2**20
"""Bytes of pictures worked on at once on a CPU."""


@dataclass(frozen=True)
class Plan:
    """What each sample goes through.

    Attributes:
        operations: `(B, S)` int64 positions in OPERATIONS, applied from left to right.
        magnitudes: `(B, S)` float32 in the unit of the operation: source pixels a pixel (shears), pixels
            (translations), degrees counter-clockwise (Rotate), bits kept (Posterize), share of 255 (Solarize), change
            of the factor from 1 (Brightness, Color, Contrast, Sharpness).
    """

    operations: NDArray[np.int64]
    magnitudes: NDArray[np.float32]


def run(images: Tensor, plan: Plan, interpolation: str = "nearest") -> Tensor:
    """Apply `plan`.

    Args:
        images: uint8 `(B, C, H, W)`, any strides; left as it is.
        plan: For the B samples.
        interpolation: `nearest` or `bilinear`, of the geometric operations; what comes from outside is 0.

    Returns:
        uint8 `(B, C, H, W)` with the strides of `images`.
    """
    result = torch.empty_like(images)
    # Large enough for a few samples of each operation, small enough to stay in a CPU's cache from slot to slot.
    count = max(1, _BLOCK // images[0].numel()) if images.device.type == "cpu" else len(images)
    parameters = parameters_of(plan, (images.shape[-2], images.shape[-1]))
    for first in range(0, len(images), count):
        part = slice(first, first + count)
        planes = torch.empty_like(images[part], memory_format=torch.contiguous_format)
        copy_pixels(images[part], planes)
        copy_pixels(_run_block(planes, _KIND[plan.operations[part]], parameters[part], interpolation), result[part])
    return result


def _run_block(planes: Tensor, kinds: NDArray[np.int64], parameters: NDArray[np.float32], interpolation: str) -> Tensor:
    place = np.arange(len(planes))  # which sample each row holds now
    for slot in range(kinds.shape[1]):
        order = np.argsort(kinds[place, slot], kind="stable")
        place = place[order]
        kind = kinds[place, slot]
        planes = planes.index_select(0, to_device(order, planes.device))
        sent = to_device(parameters[place, slot], planes.device)
        starts = np.flatnonzero(np.diff(kind, prepend=-1)).tolist()
        for start, stop in zip(starts, [*starts[1:], len(kind)], strict=True):
            function = _FUNCTIONS[kind[start]]
            if function is not None:
                _apply(function, planes[start:stop], sent[start:stop], interpolation)
    return planes.index_select(0, to_device(np.argsort(place), planes.device))


def _apply(function: Callable[..., Tensor], planes: Tensor, parameters: Tensor, interpolation: str) -> None:
    for part in chunks(planes):
        if function is warp:
            planes[part] = warp(planes[part], parameters[part], interpolation)
        else:
            planes[part] = function(planes[part], parameters[part, 0])


def parameters_of(plan: Plan, size: tuple[int, int]) -> NDArray[np.float32]:
    """Return what the functions below take.

    Args:
        plan: For B samples.
        size: Height and width, in pixels.

    Returns:
        `(B, S, 6)`. For geometric operations the inverse map [a, b, c, d, e, f]: output (x, y), in pixels from the
        centre, shows input (ax + by + c, dx + ey + f), in halves of the width and height from the centre; shears keep
        the top left corner, rotations the centre. For the others their one parameter and nothing.
    """
    height, width = size
    m = plan.magnitudes.astype(np.float64)
    shear_x, shear_y, left, up, turned = (plan.operations == _PLACE[name] for name in GEOMETRIC)
    angle = np.deg2rad(m * turned)
    rows = np.zeros((*m.shape, 6))
    rows[..., 0] = rows[..., 4] = np.cos(angle)
    rows[..., 1] = m * shear_x - np.sin(angle)
    rows[..., 3] = m * shear_y + np.sin(angle)
    rows[..., 2] = m * shear_x * (height / 2) - np.trunc(m) * left
    rows[..., 5] = m * shear_y * (width / 2) - np.trunc(m) * up
    rows *= np.repeat([2 / width, 2 / height], 3)
    single = (
        np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0]) * (m * _SCALE[plan.operations] + _OFFSET[plan.operations])[..., None]
    )
    return np.where((_KIND[plan.operations] == _KIND[_PLACE["Rotate"]])[..., None], rows, single).astype(np.float32)


def to_uint8(values: Tensor) -> Tensor:
    """Cut float values off at 0 and 255 and drop what is behind the point, in place where that is quicker."""
    # By way of int16, which is two to three times as quick on a CPU as straight to uint8.
    return values.clamp_(0.0, 255.0).to(torch.int16).to(torch.uint8)


def warp(images: Tensor, matrix: Tensor, interpolation: str = "nearest") -> Tensor:
    """Resample by an affine map; what comes from outside is 0.

    Args:
        images: uint8 `(n, C, H, W)`.
        matrix: `(n, 6)` float32, from `parameters_of`.
        interpolation: `nearest` or `bilinear`.
    """
    height, width = images.shape[-2:]
    x = to_device(np.arange(width, dtype=np.float32) - (width - 1) / 2, images.device).view(1, 1, 1, -1)
    y = to_device(np.arange(height, dtype=np.float32) - (height - 1) / 2, images.device).view(1, 1, -1, 1)
    per_x, per_y, constant = matrix.view(-1, 2, 3, 1, 1).unbind(dim=2)
    grid = per_x * x + (per_y * y + constant)
    values = F.grid_sample(images.float(), grid.permute(0, 2, 3, 1), mode=interpolation, align_corners=False)
    return values.to(torch.int16).to(torch.uint8) if interpolation == "nearest" else to_uint8(values.round_())


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply by `factor` `(n,)`."""
    return to_uint8(images.float().mul_(factor.view(-1, 1, 1, 1)))


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Stretch RGB about each pixel's grey by `factor` `(n,)`; pictures without colour stay."""
    if images.shape[1] != 3:
        return images
    factor = factor.view(-1, 1, 1, 1)
    grey = luma(images).mul_(1.0 - factor)
    return to_uint8(images.float().mul_(factor).add_(grey))


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Stretch about each picture's mean by `factor` `(n,)`: of the luma of RGB, else of all channels."""
    factor = factor.view(-1, 1, 1, 1)
    grey = luma(images) if images.shape[1] == 3 else images
    # Whole numbers in float64 add up to the same in every order.
    mean = grey.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64) / grey[0].numel()
    return to_uint8(images.float().mul_(factor).add_(mean.float() * (1.0 - factor)))


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Stretch about a 3×3 smoothing (centre 5, others 1, over 13) by `factor` `(n,)`; the outermost pixels stay."""
    if min(images.shape[-2:]) <= 2:
        return images
    # On the memory as one row, which is quick; what runs over an edge of the picture only ever ends in its border.
    width, levels = images.shape[-1], images.to(torch.int16).flatten()
    across = (levels[:-2] + levels[1:-1]).add_(levels[2:])
    total = torch.zeros_like(levels)
    torch.add(across[: -2 * width], across[width:-width], out=total[width + 1 : -width - 1])
    total[width + 1 : -width - 1].add_(across[2 * width :])
    # factor · level + (1 - factor) · (total + 4 · level) / 13
    share = (1.0 - factor.view(-1, 1, 1, 1)) * (1.0 / 13.0)
    values = total.view(images.shape).float().mul_(share)
    values = to_uint8(values.add_(images.float().mul_(factor.view(-1, 1, 1, 1) + 4.0 * share)))
    result = images.clone()
    result[..., 1:-1, 1:-1] = values[..., 1:-1, 1:-1]
    return result


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper `bits` `(n,)` of each level, 0 to 8."""
    dropped = (8 - bits).to(torch.int32)
    mask = torch.full_like(dropped, 255) << dropped
    return images & (mask & 255).to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the levels of at least `threshold` `(n,)`, 0 to 255."""
    below = images.to(torch.int16).sub_(threshold.ceil().to(torch.int16).view(-1, 1, 1, 1))
    # The sign spread over all bits, 0 or -1: arithmetic, since comparisons of bytes are not vectorised.
    return images ^ below.bitwise_right_shift_(15).bitwise_not_().to(torch.uint8)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to the full range; one of a single level stays."""
    low = images.amin(dim=(2, 3), keepdim=True).float()
    span = images.amax(dim=(2, 3), keepdim=True).float().sub_(low)
    flat = span == 0
    low = torch.where(flat, 0.0, low)
    scale = torch.where(flat, 1.0, span * (1.0 / 255.0))
    return to_uint8(images.float().sub_(low).div_(scale))


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Even out each channel's histogram, as Pillow does."""
    levels = images.flatten(2).long()
    histogram = torch.zeros((*levels.shape[:2], 256), dtype=torch.int32, device=images.device)
    histogram.scatter_add_(2, levels, histogram.new_ones(()).expand_as(levels))
    # Pillow leaves the highest level that occurs out of the sum.
    highest = images.amax(dim=(2, 3)).long().unsqueeze(2)
    step = (levels.shape[2] - histogram.gather(2, highest)) // 255
    below = histogram.cumsum(2, dtype=torch.int32).sub_(histogram).add_(step // 2)
    # In float64 the division is quicker and its floor is exact.
    table = below.double().div_(step.clamp(min=1)).clamp_(max=255).to(torch.uint8)
    table = torch.where(step == 0, torch.arange(256, device=images.device, dtype=torch.uint8), table)
    return table.gather(2, levels).view(images.shape)


def invert(images: Tensor, _: Tensor) -> Tensor:
    """Turn level v into 255 - v."""
    return images.bitwise_not()


_KIND = np.array([0, 1, 1, 1, 1, 1, *range(2, 11)])
"""For each operation its place in `_FUNCTIONS`: the geometric ones are one."""
_FUNCTIONS: tuple[Callable[..., Tensor] | None, ...] = (
    None,
    warp,
    adjust_brightness,
    adjust_saturation,
    adjust_contrast,
    adjust_sharpness,
    posterize,
    solarize,
    autocontrast,
    equalize,
    invert,
)
