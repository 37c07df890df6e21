"""Reading one picture of unknown origin, always with Pillow.

torchvision's decoder crashes the process on damaged PNGs and knows no limit of size.
"""

from __future__ import annotations

import functools
import os
import stat
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cvtrain.data.source import square, to_tensor
from cvtrain.errors import DataError

MAX_PIXELS = 89_478_485
"""Pillow warns above this and refuses above twice this; both are an error here."""

# EPS runs Ghostscript, the others are stubs that cannot decode.
_REFUSED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112


@functools.cache
def formats() -> tuple[str, ...]:
    """Return the names of the formats that are opened."""
    Image.init()
    return tuple(sorted(name for name in Image.OPEN if name not in _REFUSED_FORMATS))


@functools.cache
def extensions() -> frozenset[str]:
    """Return the file name extensions of these formats, lower case with the dot."""
    return frozenset(end.lower() for end, name in Image.registered_extensions().items() if name in formats())


def printable(path: str) -> str:
    """Return a path as text that prints on one line of any terminal, other bytes as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_picture(path: str, resize: int, channels: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read a picture as a square.

    Args:
        path: The file.
        resize: Side of the square, in pixels: the short side is resized to it, the centre cropped.
        channels: 1 for grey, 3 for RGB.
        max_pixels: Largest width × height, judged by the header before anything is decoded.

    Returns:
        uint8 `(channels, resize, resize)`. EXIF rotation is applied; of an animation it is the first frame;
        transparency lies over white; 16 bits are scaled to 8.

    Raises:
        DataError: Not a regular file, unreadable, too large, or of floating-point values.
    """
    with _errors(path), _opened(path, max_pixels) as image:
        orientation = _orientation(image)
        # JPEG can be decoded at 1/2, 1/4 or 1/8; twice the target leaves the quality to the resize.
        image.draft(None, (2 * resize, 2 * resize))
        plain = _plain(image, "L" if channels == 1 else "RGB")
        turn = _TURNS.get(orientation)
        return to_tensor(square(plain if turn is None else plain.transpose(turn), resize))


def verify_picture(path: str, max_pixels: int = MAX_PIXELS) -> None:
    """Check a picture's header, size and, where the format has one, checksum, without decoding it.

    Raises:
        DataError: As `read_picture`, as far as that shows without decoding.
    """
    with _errors(path), _opened(path, max_pixels) as image:
        if image.mode == "F":
            raise DataError(_FLOAT)
        image.verify()


_FLOAT = "floating-point values, whose range is unknown; save it as 8 or 16 bits"


class _errors:  # noqa: N801 - a context manager, used like a function
    """Turns whatever Pillow raises for a damaged file into one `DataError: path: reason`."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Running out of memory says nothing about the file.
        if not isinstance(error, Exception) or isinstance(error, MemoryError):
            return
        lines = str(error).splitlines()
        # An OSError repeats the path, and Pillow's "cannot identify" the path's repr.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else lines[0] if lines else ""
        if isinstance(error, UnidentifiedImageError):
            reason = "not a picture in any format that is opened"
        raise DataError(f"{printable(self._path)}: {reason or type(error).__name__}") from error


def _opened(path: str, max_pixels: int) -> Image.Image:
    status = os.stat(path)  # noqa: PTH116 - the path may hold bytes that are no text
    # Opening a FIFO would wait for ever.
    if not stat.S_ISREG(status.st_mode):
        raise DataError("not a regular file")
    if status.st_size == 0:
        raise DataError("empty file")
    image = Image.open(path, formats=formats())
    if image.width * image.height > max_pixels:
        image.close()
        raise DataError(f"{image.width} × {image.height} pixels, more than data.max_pixels={max_pixels}")
    return image


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 where there is none; damaged EXIF does not make a picture unreadable."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        return 1


def _plain(image: Image.Image, mode: str) -> Image.Image:
    """Return `image` as 8-bit "L" or "RGB"."""
    if image.mode == "F":
        raise DataError(_FLOAT)
    if image.mode.startswith("I"):
        return _from_integers(image).convert(mode)
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layers).convert(mode)
    return image.convert(mode)


def _from_integers(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8; Pillow's own conversion would clip it to white."""
    values: NDArray[Any] = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise DataError(f"32-bit values from {low} to {high}; save it as 8 or 16 bits")
    return Image.fromarray(np.round(values.astype(np.float32) / 257.0).astype(np.uint8))
