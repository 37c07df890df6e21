"""Operations that move pixels: flips, crops, affine maps.

Each is a pure function of pictures and host arrays, with one set of parameters a sample, under a thin class that draws
them. A function may write into the pictures it is given. Coordinates are in pixels, the centre of the first pixel at 0.
What comes from outside the picture is 0 (black).

Flips and crops by whole pixels exist twice: on a CPU copies of memory are several times quicker than the batched
gather that other devices want. Both give the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cvtrain.aug.boxes import DRAWS, Boxes, random_boxes
from cvtrain.aug.ranges import CACHED_PIXELS, chunks, interval, number, pixels_of, store, stretch, to_device
from cvtrain.core.crops import resized
from cvtrain.core.random import sample_uniforms
from cvtrain.core.types import Box, Draw

Parameters = NDArray[np.float32]


def flip(images: Tensor, chosen: NDArray[np.bool_], dim: int) -> Tensor:
    """Mirror the `chosen` `(B,)` of uint8 `images` `(B, C, H, W)` along `dim` (-1 or -2)."""
    if images.device.type != "cpu":
        return flip_batched(images, chosen, dim)
    where = np.flatnonzero(chosen)
    if not images.is_contiguous(memory_format=torch.channels_last):
        # Planes are not worth laying out anew: torch is quick at flipping them.
        pixels_of(images)[where] = torch.from_numpy(pixels_of(images)[where]).flip(dim - 1).numpy()
        return images
    rows = _rows(images)
    part = rows[where]
    if dim == -1:
        # torch reverses all pixels in a third of the time that it takes for each row; the rows are put in order below.
        pixels = torch.from_numpy(part.view(np.uint8)).view(part.size * images.shape[-1], images.shape[1])
        part = pixels.flip(0).numpy().reshape(-1).view(rows.dtype).reshape(part.shape)[::-1]
    rows[where] = part[:, ::-1]
    return images


def flip_batched(images: Tensor, chosen: NDArray[np.bool_], dim: int) -> Tensor:
    """Do what `flip` does without asking which pictures are chosen."""
    return torch.where(to_device(chosen, images.device).view(-1, 1, 1, 1), images.flip(dim), images)


def shifted_crop(images: Tensor, top: NDArray[np.int64], left: NDArray[np.int64], padding: int) -> Tensor:
    """Pad with 0 on all sides and cut a window of the old size.

    Args:
        images: uint8 `(B, C, H, W)`.
        top: `(B,)` first row of the window in the padded picture, 0 to 2·padding.
        left: `(B,)` first column.
        padding: In pixels.

    Returns:
        uint8 `(B, C, H, W)`.
    """
    if images.device.type != "cpu":
        return shifted_crop_batched(images, top, left, padding)
    images = images.contiguous(memory_format=torch.channels_last)
    channels, height, width = images.shape[1:]
    rows = _rows(images)
    # A few pictures' frames stay in the cache, and their borders black.
    count = max(1, min(len(rows), CACHED_PIXELS // (2 * height * width)))
    frames = np.zeros((count, height + 2 * padding, width + 2 * padding, channels), dtype=np.uint8)
    frame, line, pixel, _ = frames.strides
    middle = np.ndarray((count, height), rows.dtype, frames, padding * (line + pixel), (frame, line))
    sides = 2 * padding + 1
    windows = np.ndarray((count, sides, sides, height), rows.dtype, frames, 0, (frame, line, pixel, line))
    for first in range(0, len(rows), count):
        part = rows[first : first + count]
        last = first + len(part)
        middle[: len(part)] = part
        part[...] = windows[np.arange(len(part)), top[first:last], left[first:last]]
    return images


def shifted_crop_batched(images: Tensor, top: NDArray[np.int64], left: NDArray[np.int64], padding: int) -> Tensor:
    """Do what `shifted_crop` does in one gather."""
    height, width = images.shape[-2:]
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    samples = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    rows = to_device(top[:, None] + np.arange(height), images.device)[:, :, None]
    columns = to_device(left[:, None] + np.arange(width), images.device)[:, None, :]
    return padded[samples, rows, columns].permute(0, 3, 1, 2)


def _rows(images: Tensor) -> NDArray[np.void]:
    """Return the rows `(B, H)` of pictures `(B, C, H, W)` with channels last in memory, a view.

    NumPy copies a row that is one item twice as fast as a row of bytes.
    """
    batch, channels, height, width = images.shape
    row = np.dtype((np.void, width * channels))
    return pixels_of(images).reshape(batch, height, row.itemsize).view(row)[..., 0]


def affine(images: Tensor, degrees: Parameters, shift: tuple[Parameters, Parameters], scale: Parameters) -> Tensor:
    """Rotate and scale about the centre of the picture, then shift; bilinear.

    Args:
        images: uint8 `(B, C, H, W)`.
        degrees: `(B,)` angle, clockwise.
        shift: `(B,)` to the right and `(B,)` downwards, in pixels.
        scale: `(B,)`, above 1 enlarges.

    Returns:
        uint8 `(B, C, H, W)`.
    """
    height, width = images.shape[-2:]
    columns = np.arange(width) - (width - 1) / 2 - shift[0][:, None]
    rows = np.arange(height) - (height - 1) / 2 - shift[1][:, None]
    cosine = (np.cos(np.deg2rad(degrees)) / scale)[:, None]
    sine = (np.sin(np.deg2rad(degrees)) / scale)[:, None]
    # Where each output pixel comes from, hence the inverse map: x, then y, each a sum of a term a column and one a row,
    # in halves of the picture from its centre as `grid_sample` counts.
    across = np.stack([cosine * columns * (2 / width), -sine * columns * (2 / height)]).astype(np.float32)
    down = np.stack([sine * rows * (2 / width), cosine * rows * (2 / height)]).astype(np.float32)
    x_across, y_across = to_device(across, images.device).unsqueeze(2)
    x_down, y_down = to_device(down, images.device).unsqueeze(3)
    for part in chunks(images):
        source = images[part]
        grid = torch.empty((len(source), height, width, 2), device=images.device)
        torch.add(x_across[part], x_down[part], out=grid[..., 0])
        torch.add(y_across[part], y_down[part], out=grid[..., 1])
        store(F.grid_sample(source.float(), grid, mode="bilinear", align_corners=False), source)
    return images


def resized_crop(images: Tensor, boxes: Boxes, size: int) -> Tensor:
    """Cut a box a sample and resize it to `(size, size)`, bilinearly with antialiasing.

    Args:
        images: uint8 `(B, C, H, W)`.
        boxes: One a sample.
        size: In pixels.

    Returns:
        uint8 `(B, C, size, size)`.
    """
    if images.device.type != "cpu":
        return resized_crop_batched(images, boxes, size)
    pictures = zip(torch.split(images, 1), boxes.each(), strict=True)
    return resized([image[:, :, y : y + rows, x : x + columns] for image, (y, x, rows, columns) in pictures], size)


def resized_crop_batched(images: Tensor, boxes: Boxes, size: int) -> Tensor:
    """Do what `resized_crop` does, within one level, by two matrix products a sample."""
    shape = (len(images), images.shape[1], size, size)
    result = torch.empty(shape, dtype=torch.uint8, device=images.device, memory_format=torch.channels_last)
    borders = np.stack([boxes.top, boxes.height, boxes.left, boxes.width]).astype(np.float32)
    top, height, left, width = to_device(borders, images.device)[:, :, None, None]
    # Half precision would be a level off.
    with torch.autocast(images.device.type, enabled=False):
        for part in chunks(images):
            pixels = images[part].permute(0, 2, 3, 1).float()
            down = _triangles(top[part], height[part], size, images.shape[-2]) @ pixels.flatten(2)
            down = down.view(len(pixels), size, *pixels.shape[2:]).transpose(1, 2)
            across = _triangles(left[part], width[part], size, images.shape[-1]) @ down.flatten(2)
            resized = across.view(len(pixels), size, size, -1).permute(0, 3, 2, 1)
            store(resized.clamp_(0.0, 255.0), result[part])
    return result


def _triangles(first: Tensor, length: Tensor, size: int, count: int) -> Tensor:
    """Return the weights `(B, size, count)` with which pixels of a row or column make the resized ones.

    Args:
        first: `(B, 1, 1)` first pixel of the box.
        length: `(B, 1, 1)` pixels of the box.
        size: Pixels after the resize.
        count: Pixels of the whole picture.
    """
    step = length / size
    # Distances from the box's edge, between centres of pixels.
    centres = (torch.arange(size, device=first.device).view(1, -1, 1) + 0.5) * step
    pixels = torch.arange(count, device=first.device).view(1, 1, -1) + 0.5 - first
    weights = (1.0 - (pixels - centres).abs() / step.clamp(min=1.0)).clamp(min=0.0)
    weights = weights * ((pixels > 0) & (pixels < length))
    return weights / weights.sum(dim=2, keepdim=True)


class HorizontalFlip:
    """Mirror left and right with probability `prob`."""

    def __init__(self, prob: float = 0.5) -> None:
        self.prob = number("prob", prob, 0, 1)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to the same."""
        return flip(images, draw(1)[:, 0] < self.prob, -1)


class VerticalFlip:
    """Mirror top and bottom with probability `prob`."""

    def __init__(self, prob: float = 0.5) -> None:
        self.prob = number("prob", prob, 0, 1)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to the same."""
        return flip(images, draw(1)[:, 0] < self.prob, -2)


class RandomCrop:
    """Pad with `padding` black pixels and cut a random window of the old size: a shift by whole pixels."""

    def __init__(self, padding: int = 4) -> None:
        self.padding = int(number("padding", padding))

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to the same."""
        offsets = (draw(2) * np.float32(2 * self.padding + 1)).astype(np.int64)
        return shifted_crop(images, offsets[:, 0], offsets[:, 1], self.padding)


class Affine:
    """Rotate, shift and scale at random, bilinearly.

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
        """Map uint8 `(B, C, H, W)` to the same."""
        height, width = images.shape[-2:]
        uniforms = draw(4)
        degrees = stretch(uniforms[:, 0], -self.degrees, self.degrees)
        x = stretch(uniforms[:, 1], -self.translate, self.translate) * np.float32(width)
        y = stretch(uniforms[:, 2], -self.translate, self.translate) * np.float32(height)
        return affine(images, degrees, (x, y), stretch(uniforms[:, 3], *self.scale))


class Rotation(Affine):
    """Rotate about the centre by an angle uniform in ±degrees."""

    def __init__(self, degrees: float = 15.0) -> None:
        super().__init__(degrees=degrees)


class RandomResizedCrop:
    """Cut a random box and resize it to the model's input (Szegedy et al. 2015, arXiv:1409.4842).

    The resize is bilinear with antialiasing, as Pillow's and torchvision's default are.

    Args:
        scale: Smallest and largest share of the area.
        ratio: Smallest and largest width/height.
    """

    def __init__(self, scale: Sequence[float] = (0.08, 1.0), ratio: Sequence[float] = (3 / 4, 4 / 3)) -> None:
        self.scale = interval("scale", scale, 1e-6, 1)
        self.ratio = interval("ratio", ratio, 1e-3)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to `(B, C, H, H)`."""
        return self.to_size(images, draw, images.shape[-2])

    def to_size(self, images: Tensor, draw: Draw, img_size: int) -> Tensor:
        """Map uint8 `(B, C, H, W)` to `(B, C, img_size, img_size)`."""
        size = (images.shape[-2], images.shape[-1])
        return resized_crop(images, random_boxes(draw(DRAWS), size, self.scale, self.ratio), img_size)

    def chooser(self, stream: str) -> RandomBox:
        """Return the choice of the box alone, for a picture cropped while it is read."""
        return RandomBox(stream, self.scale, self.ratio)


@dataclass(frozen=True)
class RandomBox:
    """The boxes that a `RandomResizedCrop` takes of pictures; a `CropChooser`.

    Attributes:
        stream: Name of the randomness.
        scale: As there.
        ratio: As there.
    """

    stream: str
    scale: tuple[float, float]
    ratio: tuple[float, float]

    def draw(self, seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return `(B, DRAWS)` numbers for the samples `indices`."""
        return sample_uniforms(seed, epoch, indices, self.stream, DRAWS)

    def boxes(self, uniforms: NDArray[np.float32], size: tuple[int, int]) -> list[Box]:
        """Return a box for each row of `draw`, in pictures of `size` (height, width)."""
        return random_boxes(uniforms, size, self.scale, self.ratio).each()
