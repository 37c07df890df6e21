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
    device, size = images.device, (images.shape[-2], images.shape[-1])
    planes = images.contiguous()
    place = np.arange(len(images))  # which sample each row holds now
    for slot in range(plan.operations.shape[1]):
        operation, magnitude = plan.operations[place, slot], plan.magnitudes[place, slot]
        order = np.argsort(_KIND[operation], kind="stable")
        place, kind = place[order], _KIND[operation[order]]
        parameters = to_device(_parameters(operation[order], magnitude[order], size), device)
        planes = planes.index_select(0, to_device(order, device))
        starts = np.flatnonzero(np.diff(kind, prepend=-1)).tolist()
        for start, stop in zip(starts, [*starts[1:], len(kind)], strict=True):
            function = _FUNCTIONS[kind[start]]
            if function is not None:
                _apply(function, planes[start:stop], parameters[start:stop], interpolation)
    planes = planes.index_select(0, to_device(np.argsort(place), device))
    result = torch.empty_like(images)
    # Channel by channel, for torch is slow at interleaving them itself.
    for channel in range(images.shape[1]):
        result[:, channel] = planes[:, channel]
    return result


def _apply(function: Callable[..., Tensor], planes: Tensor, parameters: Tensor, interpolation: str) -> None:
    for part in chunks(planes):
        if function is warp:
            planes[part] = warp(planes[part], parameters[part].view(-1, 2, 3), interpolation)
        else:
            planes[part] = function(planes[part], parameters[part, 0])


def _parameters(
    operation: NDArray[np.int64], magnitude: NDArray[np.float32], size: tuple[int, int]
) -> NDArray[np.float32]:
    """Return `(B, 6)`: the rows of an inverse affine matrix, else the one parameter of the operation and nothing."""
    rows = np.zeros((len(operation), 6), dtype=np.float32)
    geometric = _KIND[operation] == _KIND[OPERATIONS.index("Rotate")]
    rows[geometric] = inverse_matrices(operation[geometric], magnitude[geometric], size)
    rest = ~geometric
    name, value = operation[rest], magnitude[rest].astype(np.float64)
    value = np.where(np.isin(name, _FACTORS), 1.0 + value, value)
    value = np.where(name == OPERATIONS.index("Solarize"), 255.0 * value, value)
    rows[rest, 0] = value
    return rows


def inverse_matrices(
    operation: NDArray[np.int64], magnitude: NDArray[np.float32], size: tuple[int, int]
) -> NDArray[np.float32]:
    """Return where the geometric operations take their pixels from.

    Args:
        operation: `(n,)` positions in OPERATIONS.
        magnitude: `(n,)`, as in `Plan`.
        size: Height and width, in pixels.

    Returns:
        `(n, 6)` [a, b, c, d, e, f]: output (x, y), in pixels from the centre, shows input (ax + by + c, dx + ey + f).
        Shears keep the top left corner, rotations the centre.
    """
    (height, width), m = size, magnitude.astype(np.float64)
    matrix = np.tile(np.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]), (len(m), 1))
    name = np.asarray(OPERATIONS)[operation]
    matrix[:, 1] = np.where(name == "ShearX", m, 0.0)
    matrix[:, 3] = np.where(name == "ShearY", m, 0.0)
    matrix[:, 2] = matrix[:, 1] * (height / 2) - np.where(name == "TranslateX", np.trunc(m), 0.0)
    matrix[:, 5] = matrix[:, 3] * (width / 2) - np.where(name == "TranslateY", np.trunc(m), 0.0)
    turned = name == "Rotate"
    cosine, sine = np.cos(np.deg2rad(m[turned])), np.sin(np.deg2rad(m[turned]))
    matrix[turned] = np.stack([cosine, -sine, 0 * sine, sine, cosine, 0 * sine], axis=1)
    return matrix.astype(np.float32)


def to_uint8(values: Tensor) -> Tensor:
    """Cut float values off at 0 and 255 and drop what is behind the point, in place where that is quicker."""
    # By way of int16, which is two to three times as quick on a CPU as straight to uint8.
    return values.clamp_(0.0, 255.0).to(torch.int16).to(torch.uint8)


def warp(images: Tensor, matrix: Tensor, interpolation: str = "nearest") -> Tensor:
    """Resample by an affine map.

    Args:
        images: uint8 `(n, C, H, W)`.
        matrix: `(n, 2, 3)` float32, as `inverse_matrices`.
        interpolation: `nearest` or `bilinear`.
    """
    count, _, height, width = images.shape
    x = torch.arange(width, device=images.device, dtype=torch.float32).sub_((width - 1) / 2).view(1, 1, 1, -1)
    y = torch.arange(height, device=images.device, dtype=torch.float32).sub_((height - 1) / 2).view(1, 1, -1, 1)
    a, b, c = (matrix[:, :, k].reshape(count, 2, 1, 1) for k in range(3))
    # grid_sample wants -1 and 1 at the picture's outer edges.
    grid = torch.empty((count, 2, height, width), device=images.device)
    for axis, half in ((0, width / 2), (1, height / 2)):
        across = (a[:, axis] / half) * x[:, 0]
        down = (b[:, axis] / half) * y[:, 0] + c[:, axis] / half
        torch.add(across, down, out=grid[:, axis])
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
    levels = images.to(torch.int16)
    across = levels[..., 1:] + levels[..., :-1]
    across = across[..., 1:] + levels[..., :-2]
    total = across[..., 1:-1, :] + across[..., :-2, :]
    total.add_(across[..., 2:, :])
    inner = images[..., 1:-1, 1:-1].float()
    factor = factor.view(-1, 1, 1, 1)
    # factor · inner + (1 - factor) · (total + 4 · inner) / 13
    share = (1.0 - factor) * (1.0 / 13.0)
    values = total.float().mul_(share).add_(inner.mul_(factor + 4.0 * share))
    result = images.clone()
    result[..., 1:-1, 1:-1] = to_uint8(values)
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
    histogram = torch.zeros((*levels.shape[:2], 256), dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, levels, histogram.new_ones(()).expand_as(levels))
    return _equalizing_table(histogram).gather(2, levels).view(images.shape)


def _equalizing_table(histogram: Tensor) -> Tensor:
    """Return the new level of each of 256 levels, uint8, for int64 histograms `(…, 256)`."""
    levels = torch.arange(256, device=histogram.device)
    total = histogram.cumsum(-1)
    # Pillow leaves the highest level that occurs out of the sum.
    highest = torch.where(histogram > 0, levels, 0).amax(dim=-1, keepdim=True)
    step = (total[..., -1:] - histogram.gather(-1, highest)) // 255
    table = (total - histogram + step // 2) // step.clamp(min=1)
    return torch.where(step == 0, levels, table.clamp_(max=255)).to(torch.uint8)


def invert(images: Tensor, _: Tensor) -> Tensor:
    """Turn level v into 255 - v."""
    return images.bitwise_not()


_FACTORS = [OPERATIONS.index(name) for name in ("Brightness", "Color", "Contrast", "Sharpness")]
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
