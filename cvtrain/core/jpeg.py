"""JPEGs through simplejpeg, where it is installed (the extra `jpeg`): Pillow's pixels in less time; torch-free.

Both decode with libjpeg-turbo. Pillow copies each row into pixels of four bytes and those into the array that is
wanted; simplejpeg writes the array itself. A run must read the same pixels with it and without it, so it is given only
kinds of JPEG for which that is proven, and whatever it so much as warns about is left to Pillow.
"""

from __future__ import annotations

import functools
import importlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin

_Decoder = Callable[..., NDArray[np.uint8]]

_LARGEST_FILE = 1 << 26
"""Bytes; a larger file is left to Pillow, which never holds the whole of it."""

_SMALLEST_SIDE = 16
"""Pixels; of a smaller picture two of TurboJPEG's scales, which are eighths, may have the same size."""

_STOPS, _SHARE = 1 << 18, 0.85
"""In a file of more bytes, the share of the rows from which on all of them take simplejpeg less time than these Pillow.

Pillow stops after a block of 64 KiB. The times met at 0.65 of the rows in full size, 0.8 in half, 0.85 in a quarter.
"""


def decoded(image: Image.Image, rows: int) -> NDArray[np.uint8] | None:
    """Decode a JPEG in the size for which Pillow's `draft` has prepared it.

    Args:
        image: As opened by Pillow, pixels not yet loaded; it can be loaded afterwards as if nothing had happened.
        rows: How many of its rows are needed, from the top; Pillow can stop there.

    Returns:
        uint8 `(H, W, 3)`, equal to `np.array(image)`; None: Pillow has to decode it, because it is no RGB JPEG of a
        usual kind, not sound in every bit, faster there, or simplejpeg is not installed.
    """
    if image.format != "JPEG" or image.mode != "RGB":
        return None
    decode = _decoder()
    return None if decode is None else _attempt(decode, image, rows)


@functools.cache
def _decoder() -> _Decoder | None:
    """Return simplejpeg's decoder, or None where it is missing or gives other pixels than this Pillow."""
    try:
        decode: _Decoder = importlib.import_module("simplejpeg").decode_jpeg
    except Exception:
        # Built for another NumPy it raises no ImportError.
        return None
    return decode if _agrees(decode) else None


def _agrees(decode: _Decoder) -> bool:
    """Return whether both give equal pixels of every kind and scale: a Pillow may be built with another libjpeg."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 51, 3), np.uint8))
    for sampling, progressive in ((kind, way) for kind in ("4:4:4", "4:2:2", "4:2:0") for way in (False, True)):
        file = io.BytesIO()
        noise.save(file, "JPEG", quality=90, subsampling=sampling, progressive=progressive)
        for scale in (1, 2, 4, 8):
            with Image.open(file) as image:
                image.draft(None, (noise.width // scale, noise.height // scale))
                pixels = _attempt(decode, image, image.height)
                if pixels is None or not np.array_equal(pixels, np.asarray(image)):
                    return False
    return True


def _attempt(decode: _Decoder, image: Any, rows: int) -> NDArray[np.uint8] | None:  # noqa: ANN401 - a plugin's fields
    scale = image.decoderconfig[0] if image.decoderconfig else 1
    # simplejpeg takes the smallest scale that leaves this size.
    smallest = {"min_height": image.height, "min_width": image.width} if scale > 1 else {}
    try:
        if min(image.size) * scale < _SMALLEST_SIDE or JpegImagePlugin.get_sampling(image) < 0:
            return None
        size = image.fp.seek(0, io.SEEK_END)
        if size > _LARGEST_FILE or (size > _STOPS and rows < _SHARE * image.height):
            return None
        image.fp.seek(0)
        data = image.fp.read()
        if not _is_usual(data):
            return None
        # One that is too small raises: a header that libjpeg reads otherwise than Pillow takes no memory.
        room = np.empty((image.height, image.width, 3), np.uint8)
        pixels = decode(data, "RGB", buffer=room, **smallest)
    except Exception:
        # Whether it can be read at all, and how far, is Pillow's to say.
        return None
    return pixels if pixels.shape == room.shape else None


def _is_usual(data: bytes) -> bool:
    """Return whether a JPEG's frame is baseline, extended or progressive, Huffman-coded (ITU-T T.81, table B.1).

    A lossless one is never scaled, which simplejpeg does not know: it would write over the end of the buffer.
    """
    at = 2
    while True:
        mark, kind = data[at : at + 2]
        if mark != 0xFF:
            return False
        # 0xC4 and 0xCC are tables.
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xCC):
            return kind <= 0xC2
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
