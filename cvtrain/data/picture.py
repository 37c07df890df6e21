"""Pictures as tensors; `core.picture` reads them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cvtrain.core.picture import (
    BILINEAR,
    MAX_PIXELS,
    check_picture,
    extensions,
    printable,
    read_box,
    read_square,
    read_upright,
)
from cvtrain.core.types import Box

__all__ = [
    "MAX_PIXELS",
    "check_picture",
    "extensions",
    "printable",
    "read_crop",
    "read_picture",
    "read_upright",
]


def read_picture(
    content: str | bytes,
    resize: int,
    channels: int,
    max_pixels: int = MAX_PIXELS,
    place: str | None = None,
    on_frames: Callable[[str], None] | None = None,
    interpolation: str = BILINEAR,
) -> Tensor:
    """Read a picture as a square, uint8 `(channels, resize, resize)`; arguments and errors as `read_square`."""
    return torch.from_numpy(read_square(content, resize, channels, max_pixels, place, on_frames, interpolation))


def read_crop(
    content: str | bytes,
    choose: Callable[[tuple[int, int]], Box],
    size: int,
    channels: int,
    max_pixels: int = MAX_PIXELS,
    place: str | None = None,
) -> Tensor:
    """Read a box of a picture, resized to a square.

    Args:
        content: The file's path, or its bytes.
        choose: Maps (height, width) of the upright picture to a box in it, in pixels.
        size: Side of the result, in pixels; torch's antialiased bilinear resize, within one level of Pillow's and
            two to three times as fast.
        channels: 1 for grey, 3 for RGB.
        max_pixels: Largest width × height, judged by the header before anything is decoded.
        place: Where the picture is, for messages; None means the path.

    Returns:
        uint8 `(channels, size, size)`; otherwise as `read_square`.

    Raises:
        DataError: As `read_square`.
    """
    cut = torch.from_numpy(read_box(content, choose, size, channels, max_pixels, place))
    # The batch of one is made where the rows are, so that torch sees channels last, keeps them and is quick.
    return interpolate(cut[None].permute(0, 3, 1, 2), size=(size, size), mode="bilinear", antialias=True)[0]
