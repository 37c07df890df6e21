"""Operations that move pixels: flips, crops, affine maps.

Each is a pure function of tensors, with one set of parameters a sample, under a thin class that draws them.
Coordinates are in pixels, the centre of the first pixel at 0. What comes from outside the picture is 0 (black).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cvtrain.aug.boxes import DRAWS, random_boxes
from cvtrain.aug.ranges import interval, number, stretch
from cvtrain.core.types import Draw


def flip(images: Tensor, chosen: Tensor, dim: int) -> Tensor:
    """Mirror the `chosen` `(B,)` bool of `images` `(B, C, H, W)` along `dim`."""
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(dim), images)


def shifted_crop(images: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """Pad with 0 on all sides and cut a window of the old size.

    Args:
        images: `(B, C, H, W)`.
        top: `(B,)` int64 first row of the window in the padded picture, 0 to 2·padding.
        left: `(B,)` int64 first column.
        padding: In pixels.

    Returns:
        `(B, C, H, W)`.
    """
    height, width = images.shape[-2:]
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def sample_at(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Read `images` bilinearly at `x` and `y`.

    Args:
        images: Float `(B, C, H, W)`.
        x: `(B, H', W')` columns, in pixels.
        y: `(B, H', W')` rows, in pixels.

    Returns:
        Float `(B, C, H', W')`, 0 outside the picture.
    """
    height, width = images.shape[-2:]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1).to(images.dtype)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def affine(images: Tensor, degrees: Tensor, shift: tuple[Tensor, Tensor], scale: Tensor) -> Tensor:
    """Rotate and scale about the centre of the picture, then shift.

    Args:
        images: Float `(B, C, H, W)`.
        degrees: `(B,)` angle, clockwise.
        shift: `(B,)` to the right and `(B,)` downwards, in pixels.
        scale: `(B,)`, above 1 enlarges.

    Returns:
        Float `(B, C, H, W)`.
    """
    height, width = images.shape[-2:]
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    columns = torch.arange(width, device=images.device, dtype=torch.float32).view(1, 1, -1)
    rows = torch.arange(height, device=images.device, dtype=torch.float32).view(1, -1, 1)
    x = columns - centre_x - shift[0].view(-1, 1, 1)
    y = rows - centre_y - shift[1].view(-1, 1, 1)
    angle = torch.deg2rad(degrees)
    cosine = (angle.cos() / scale).view(-1, 1, 1)
    sine = (angle.sin() / scale).view(-1, 1, 1)
    # The grid asks where each output pixel comes from, hence the inverse map.
    return sample_at(images, cosine * x + sine * y + centre_x, cosine * y - sine * x + centre_y)


def resized_crop(images: Tensor, box: tuple[Tensor, Tensor, Tensor, Tensor], size: int) -> Tensor:
    """Cut a box a sample and resize it to `(size, size)`, bilinearly and without antialiasing.

    Args:
        images: Float `(B, C, H, W)`.
        box: top, left, height, width: `(B,)` each, in pixels.
        size: In pixels.

    Returns:
        Float `(B, C, size, size)`.
    """
    top, left, height, width = (part.float().view(-1, 1) for part in box)
    steps = (torch.arange(size, device=images.device, dtype=torch.float32) + 0.5).view(1, -1) / size
    # Held inside the box, so that its border repeats instead of blending with what was cut away.
    x = left + torch.minimum((steps * width - 0.5).clamp(min=0), width - 1)
    y = top + torch.minimum((steps * height - 0.5).clamp(min=0), height - 1)
    shape = (len(images), size, size)
    return sample_at(images, x[:, None, :].expand(shape), y[:, :, None].expand(shape))


class HorizontalFlip:
    """Mirror left and right with probability `prob`."""

    def __init__(self, prob: float = 0.5) -> None:
        self.prob = number("prob", prob, 0, 1)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map float `(B, C, H, W)` to the same."""
        return flip(images, draw(1)[:, 0] < self.prob, -1)


class VerticalFlip:
    """Mirror top and bottom with probability `prob`."""

    def __init__(self, prob: float = 0.5) -> None:
        self.prob = number("prob", prob, 0, 1)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map float `(B, C, H, W)` to the same."""
        return flip(images, draw(1)[:, 0] < self.prob, -2)


class RandomCrop:
    """Pad with `padding` black pixels and cut a random window of the old size: a shift by whole pixels."""

    def __init__(self, padding: int = 4) -> None:
        self.padding = int(number("padding", padding))

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map float `(B, C, H, W)` to the same."""
        offsets = (draw(2) * (2 * self.padding + 1)).long()
        return shifted_crop(images, offsets[:, 0], offsets[:, 1], self.padding)


class Affine:
    """Rotate, shift and scale at random.

    Args:
        degrees: The angle is uniform in ±degrees.
        translate: The shift is uniform in ±translate × width and ±translate × height, not rounded to pixels: on small
            pictures a fraction of a pixel matters.
        scale: The scale is uniform in this range.
    """

    def __init__(self, degrees: float = 0.0, translate: float = 0.0, scale: Sequence[float] = (1.0, 1.0)) -> None:
        self.degrees = number("degrees", degrees, 0, 180)
        self.translate = number("translate", translate, 0, 1)
        self.scale = interval("scale", scale, 1e-3)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map float `(B, C, H, W)` to the same."""
        height, width = images.shape[-2:]
        uniforms = draw(4)
        degrees = stretch(uniforms[:, 0], -self.degrees, self.degrees)
        x = stretch(uniforms[:, 1], -self.translate, self.translate) * width
        y = stretch(uniforms[:, 2], -self.translate, self.translate) * height
        return affine(images, degrees, (x, y), stretch(uniforms[:, 3], *self.scale))


class Rotation(Affine):
    """Rotate about the centre by an angle uniform in ±degrees."""

    def __init__(self, degrees: float = 15.0) -> None:
        super().__init__(degrees=degrees)


class RandomResizedCrop:
    """Cut a random box and resize it to the model's input (Szegedy et al. 2015, arXiv:1409.4842).

    The resize is bilinear without antialiasing: pictures are read at about the size they are cut to, so that it
    shrinks by little more than `eval_resize`.

    Args:
        scale: Smallest and largest share of the area.
        ratio: Smallest and largest width/height.
    """

    def __init__(self, scale: Sequence[float] = (0.08, 1.0), ratio: Sequence[float] = (3 / 4, 4 / 3)) -> None:
        self.scale = interval("scale", scale, 1e-6, 1)
        self.ratio = interval("ratio", ratio, 1e-3)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map float `(B, C, H, W)` to `(B, C, H, H)`."""
        return self.to_size(images, draw, images.shape[-2])

    def to_size(self, images: Tensor, draw: Draw, img_size: int) -> Tensor:
        """Map float `(B, C, H, W)` to `(B, C, img_size, img_size)`."""
        height, width = images.shape[-2:]
        box = random_boxes(draw(DRAWS), (height, width), self.scale, self.ratio)
        return resized_crop(images, box, img_size)
