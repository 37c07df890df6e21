"""Reading one picture of unknown origin as an array, with Pillow or as it would; torch-free.

torchvision's decoder crashes the process on damaged PNGs and knows no limit of size.
"""

from __future__ import annotations

import functools
import io
import math
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cvtrain.core import jpeg
from cvtrain.errors import DataError

if TYPE_CHECKING:
    from cvtrain.core.types import Box

BILINEAR, BICUBIC = "bilinear", "bicubic"
INTERPOLATIONS = (BILINEAR, BICUBIC)
"""How pictures are resized where they are read, both antialiased; names as in Pillow, torchvision and timm."""

MAX_PIXELS = 89_478_485
"""Pillow warns above this and refuses above twice this; both are an error here."""

# EPS runs Ghostscript, the others are stubs that cannot decode.
_REFUSED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# Each is known for sure by its first bytes.
_USUAL_FORMATS = {"BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"}

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
    """Return the names of the formats that are opened, in the order in which they are tried."""
    Image.init()
    # Pillow asks one after the other, and some read half a file before they decline.
    known = sorted(name for name in Image.OPEN if name not in _REFUSED_FORMATS)
    return tuple(sorted(known, key=lambda name: name not in _USUAL_FORMATS))


@functools.cache
def extensions() -> frozenset[str]:
    """Return the file name extensions of these formats, lower case with the dot."""
    return frozenset(end.lower() for end, name in Image.registered_extensions().items() if name in formats())


def printable(path: str) -> str:
    """Return a path as text that prints on one line of any terminal, other bytes as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_square(
    content: str | bytes,
    resize: int,
    channels: int,
    max_pixels: int = MAX_PIXELS,
    place: str | None = None,
    on_frames: Callable[[str], None] | None = None,
    interpolation: str = BILINEAR,
) -> NDArray[np.uint8]:
    """Read a picture as a square.

    Args:
        content: The file's path, or its bytes.
        resize: Side of the square, in pixels: the short side is resized to it, the centre cropped.
        channels: 1 for grey, 3 for RGB.
        max_pixels: Largest width × height, judged by the header before anything is decoded.
        place: Where the picture is, for messages; None means the path.
        on_frames: Called with the place when there are several frames or pages, of which the first is read.
        interpolation: `bilinear` or `bicubic`, antialiased.

    Returns:
        uint8 `(channels, resize, resize)`, channels last in memory. EXIF rotation is applied; of an animation it is the
        first frame; transparency lies over white; 16 bits are scaled to 8.

    Raises:
        DataError: Not a regular file, unreadable, too large, or of floating-point values.
    """
    place = place or _place(content)
    with _errors(place), _opened(content, max_pixels) as image:
        # JPEG can be decoded at 1/2, 1/4 or 1/8; twice the target leaves the quality to the resize.
        upright = _upright(image, channels, (2 * resize, 2 * resize))
        if on_frames is not None and _has_frames(image):
            on_frames(place)
        return _channels_first(square(upright, resize, interpolation))


def given_square(
    picture: Image.Image | NDArray[np.uint8],
    resize: int,
    channels: int,
    place: str = "a picture",
    interpolation: str = BILINEAR,
) -> NDArray[np.uint8]:
    """Return a picture that is in memory already as `read_square` would read it from a file.

    Args:
        picture: An image of Pillow's, or uint8 `(H, W)` or `(H, W, C)` of 1 to 4 channels, or of the model's own.
        resize: Side of the square, in pixels: the short side is resized to it, the centre cropped.
        channels: 1 for grey, 3 for RGB; more only for an array that has them.
        place: Where the picture is, for messages.
        interpolation: `bilinear` or `bicubic`, antialiased.

    Raises:
        DataError: It holds no pixels, floating-point values, or has other channels.
    """
    with _errors(place):
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.size == 0:
                raise DataError(f"an array {picture.dtype} {picture.shape}; give uint8 (height, width, channels)")
            if picture.ndim == 3 and picture.shape[2] == channels:
                return square_array(picture, resize, interpolation).transpose(2, 0, 1)
            picture = Image.fromarray(picture[..., 0] if picture.shape[2:] == (1,) else picture)
        if channels not in (1, 3):
            raise DataError(f"{len(picture.getbands())} channels for a model of {channels}")
        return _channels_first(square(_upright(picture, channels), resize, interpolation))


def read_box(
    content: str | bytes,
    choose: Callable[[tuple[int, int]], Box],
    size: int,
    channels: int,
    max_pixels: int = MAX_PIXELS,
    place: str | None = None,
) -> NDArray[np.uint8]:
    """Read a box of a picture; a JPEG is decoded no larger and no further down than a square made of it needs.

    Args:
        content: The file's path, or its bytes.
        choose: Maps (height, width) of the upright picture to a box in it, in pixels.
        size: Side of the square that is to be made of it, in pixels.
        channels: 1 for grey, 3 for RGB.
        max_pixels: Largest width × height, judged by the header before anything is decoded.
        place: Where the picture is, for messages; None means the path.

    Returns:
        uint8 `(height, width, channels)`, of a JPEG smaller than the box where that is enough; otherwise as
        `read_square`.

    Raises:
        DataError: As `read_square`.
    """
    with _errors(place or _place(content)), _opened(content, max_pixels) as image:
        turned = _orientation(image) >= 5
        width, height = image.size[::-1] if turned else image.size
        box = choose((height, width))
        shrink = max(size / box[2], size / box[3])
        wanted = (math.ceil(width * shrink), math.ceil(height * shrink))
        wanted = wanted[::-1] if turned else wanted
        if image.format == "JPEG" and _orientation(image) == 1:
            image.draft(None, wanted)
            first, last = _box_at(box, (width, height), image.size)
            pixels = jpeg.decoded(image, last[1]) if channels == 3 else None
            if pixels is not None:
                return pixels[first[1] : last[1], first[0] : last[0]]
            _load_down_to(image, last[1] - 1)
        upright = _upright(image, channels, wanted)
        first, last = _box_at(box, (width, height), upright.size)
        return _pixels(upright.crop((*first, *last)))


def _box_at(box: Box, size: tuple[int, int], scaled: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return where a box lies, at least one pixel of it, in a picture of `size` (width, height) that is now `scaled`.

    The result is the (x, y) of its first pixel and of the one behind its last.
    """
    top, left, rows, columns = box
    x, y = scaled[0] / size[0], scaled[1] / size[1]
    first = (min(round(left * x), scaled[0] - 1), min(round(top * y), scaled[1] - 1))
    return first, (max(round((left + columns) * x), first[0] + 1), max(round((top + rows) * y), first[1] + 1))


def read_upright(
    content: str | bytes, side: int | None = None, max_pixels: int = MAX_PIXELS, place: str | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """Read a whole picture.

    Args:
        content: The file's path, or its bytes.
        side: A JPEG may be decoded smaller, its short side no shorter than this; None means in full.
        max_pixels: Largest width × height, judged by the header before anything is decoded.
        place: Where the picture is, for messages; None means the path.

    Returns:
        An "RGB" image, EXIF rotation applied, and the width and height that it has in full, upright, in pixels.

    Raises:
        DataError: As `read_square`.
    """
    with _errors(place or _place(content)), _opened(content, max_pixels) as image:
        size = image.size[::-1] if _orientation(image) >= 5 else image.size
        return _upright(image, 3, image.size if side is None else (side, side)), size


def check_picture(
    content: str | bytes,
    max_pixels: int = MAX_PIXELS,
    place: str | None = None,
    on_frames: Callable[[str], None] | None = None,
) -> None:
    """Decode a picture, as small as its format allows, and throw it away; arguments as `read_square`.

    Raises:
        DataError: In all cases in which `read_square` would raise.
    """
    place = place or _place(content)
    with _errors(place), _opened(content, max_pixels) as image:
        _upright(image, 3, (1, 1))
        if on_frames is not None and _has_frames(image):
            on_frames(place)


def square(image: Image.Image, resize: int, interpolation: str = BILINEAR) -> Image.Image:
    """Resize the short side to `resize` pixels, antialiased as Pillow does it, and crop the centre.

    Only the central square is resized, so that a picture of 20000 × 2 pixels never becomes a huge one on the way.

    Args:
        image: Of any size.
        resize: Side of the result, in pixels.
        interpolation: `bilinear` or `bicubic`.
    """
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if image.size == (resize, resize):
        return image
    return image.resize(
        (resize, resize), Image.Resampling[interpolation.upper()], box=(left, top, left + side, top + side)
    )


def square_array(pixels: NDArray[np.uint8], resize: int, interpolation: str = BILINEAR) -> NDArray[np.uint8]:
    """Return uint8 `(H, W, C)` of any number of channels as `square` would: `(resize, resize, C)`."""
    if pixels.shape[2] == 3:
        return _pixels(square(Image.fromarray(pixels), resize, interpolation))
    # Pillow takes two or four channels for transparency, and no others.
    parts = [np.asarray(square(Image.fromarray(part), resize, interpolation)) for part in np.moveaxis(pixels, 2, 0)]
    return np.stack(parts, axis=-1)


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Return an "L" or "RGB" image as `(H, W, C)`, which may be written to."""
    array: NDArray[np.uint8] = np.array(image)
    return array if array.ndim == 3 else array[..., None]


def _channels_first(image: Image.Image) -> NDArray[np.uint8]:
    return _pixels(image).transpose(2, 0, 1)


def _has_frames(image: Image.Image) -> bool:
    """Return whether there is more than one frame or page; a second one that is damaged does not count.

    Asked once the first is decoded: to answer, Pillow reads on in the file.
    """
    # A photograph in MPO carries a preview or a second view for stereo; its first is the picture.
    if image.format == "MPO":
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:
        return False


_FLOAT = "floating-point values, whose range is unknown; save it as 8 or 16 bits"


class _errors:  # noqa: N801 - a context manager, used like a function
    """Turns whatever Pillow raises for a damaged file into one `DataError: path: reason`."""

    def __init__(self, place: str) -> None:
        self._place = place

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
        if isinstance(error, Image.DecompressionBombError):
            reason = f"{reason.partition('(')[2].partition(')')[0]}, more than data.max_pixels can be"
        raise DataError(f"{self._place}: {reason or type(error).__name__}") from error


def _place(content: str | bytes) -> str:
    return printable(content) if isinstance(content, str) else "a picture"


def _opened(content: str | bytes, max_pixels: int) -> Image.Image:
    if isinstance(content, bytes):
        size = len(content)
    else:
        status = os.stat(content)  # noqa: PTH116 - the path may hold bytes that are no text
        # Opening a FIFO would wait for ever.
        if not stat.S_ISREG(status.st_mode):
            raise DataError("not a regular file")
        size = status.st_size
    if size == 0:
        raise DataError("empty file")
    image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=formats())
    if image.width * image.height > max_pixels:
        image.close()
        raise DataError(f"{image.width} × {image.height} pixels, more than data.max_pixels={max_pixels}")
    return image


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 where there is none; damaged EXIF does not make a picture unreadable."""
    # Without a look at EXIF, which even where there is none costs a tenth of a small picture's decoding.
    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():
        return 1
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        return 1


def _upright(image: Image.Image, channels: int, wanted: tuple[int, int] | None = None) -> Image.Image:
    """Return the decoded picture as 8-bit "L" or "RGB", EXIF rotation applied.

    Args:
        image: As opened.
        channels: 1 or 3.
        wanted: Width and height that the stored picture may be shrunk to while a JPEG is decoded, which changes
            `image`; None: as it is.
    """
    orientation = _orientation(image)
    if wanted is not None:
        image.draft(None, wanted)
    plain = _plain(image, "L" if channels == 1 else "RGB")
    turn = _TURNS.get(orientation)
    return plain if turn is None else plain.transpose(turn)


class _Enough(Exception):  # noqa: N818 - no error
    """What is wanted of a picture is decoded."""


def _load_down_to(image: Any, row: int) -> None:  # noqa: ANN401 - Pillow does not tell the types of its plugins' hooks
    """Load a JPEG until `row` is decoded, at the latest to its end; what lies below may stay black.

    A large photograph's crop ends at six sevenths of its height on average. Pillow decodes a JPEG block by block as it
    reads the file, each row once and whole; its plugins read through `load_read`.
    """
    read, line = image.load_read, (0, row, image.width, row + 1)

    def reading(count: int) -> bytes:
        # A row that is black by itself only means that more is read than needed.
        if image.im.crop(line).getbbox() is not None:
            raise _Enough
        content: bytes = read(count)
        return content

    image.load_read = reading
    try:
        image.load()
    except _Enough:
        # As Pillow leaves it when it has loaded a picture.
        image.tile = []


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
    if image.mode == mode:
        image.load()
        return image
    return image.convert(mode)


def _from_integers(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8; Pillow's own conversion would clip it to white."""
    values: NDArray[Any] = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise DataError(f"32-bit values from {low} to {high}; save it as 8 or 16 bits")
    return Image.fromarray(np.round(values.astype(np.float32) / 257.0).astype(np.uint8))
