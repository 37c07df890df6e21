"""One small look at each picture of a data set: all that the search for duplicates needs, a kilobyte a picture."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cvtrain.core.types import DataSets, Source
from cvtrain.data.picture import MAX_PIXELS, read_upright

SPLITS = ("train", "val", "test")
SIDE = 32
"""Side of the grey thumbnails, in pixels."""
COLOURS = 4
"""Side of the colour thumbnails, in pixels."""
_BATCH = 256


@dataclass
class Views:
    """Looks at N pictures: those of train, then val, then test.

    Attributes:
        grey: uint8 `(N, 32, 32)`: the whole picture, grey, stretched to a square.
        colour: uint8 `(N, 4, 4, 3)`: the whole picture, RGB.
        sizes: `(N, 2)` int32 width and height in pixels, upright; of the square that the model gets where there is no
            file.
        pixels: N digests of size and decoded pixels.
        content: N digests of the files' bytes; None where some pictures are no files.
        splits: `(N,)` int64 positions in `SPLITS`.
        positions: `(N,)` int64 positions in the split.
        names: N names.
        labels: N texts: the name of the class, or of several joined by `+`.
    """

    grey: NDArray[np.uint8]
    colour: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    pixels: list[bytes]
    content: list[bytes] | None
    splits: NDArray[np.int64]
    positions: NDArray[np.int64]
    names: list[str]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.names)


def look(sets: DataSets, workers: int, max_pixels: int = MAX_PIXELS) -> Views:
    """Look at every picture of a data set once.

    Files are read whole, so that what lies outside the square that the model sees counts too; pictures that are not
    files are seen as the model gets them.

    Args:
        sets: All splits are looked at.
        workers: Threads that decode.
        max_pixels: Largest width × height of a file.

    Raises:
        DataError: A file that was readable when the data set was loaded no longer is.
    """
    sources: list[Source] = [getattr(sets, split) for split in SPLITS]
    counts = [len(source) for source in sources]
    looker = _Looker(sum(counts), max_pixels)
    pool = ThreadPoolExecutor(max(1, workers))
    # Pillow warns of sizes and EXIF that the loading has judged.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            for source, first in zip(sources, np.cumsum([0, *counts[:-1]]).tolist(), strict=True):
                looker.take(source, first, pool)
            looker.confirm(pool)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return Views(
        grey=looker.grey,
        colour=looker.colour,
        sizes=looker.sizes,
        pixels=looker.pixels,
        content=looker.content if looker.files and len(looker.files) == len(looker.content) else None,
        splits=np.repeat(np.arange(len(SPLITS)), counts),
        positions=np.concatenate([np.arange(count) for count in counts]),
        names=[name for source in sources for name in source.names],
        labels=[label for source in sources for label in label_names(source, sets.class_names)],
    )


class _Looker:
    """The looks, filled row by row."""

    def __init__(self, count: int, max_pixels: int) -> None:
        self.grey = np.zeros((count, SIDE, SIDE), np.uint8)
        self.colour = np.zeros((count, COLOURS, COLOURS, 3), np.uint8)
        self.sizes = np.zeros((count, 2), np.int32)
        self.pixels = [b""] * count
        self.content = [b""] * count
        self.files: dict[int, Callable[[], str | bytes]] = {}
        self._names = [""] * count
        self._shrunk = np.zeros(count, np.bool_)
        self._max_pixels = max_pixels

    def take(self, source: Source, first: int, pool: ThreadPoolExecutor) -> None:
        """Look at the pictures of `source`, whose rows begin at `first`."""
        content = _encoded(source)
        if content is not None:
            for index, name in enumerate(source.names):
                self.files[first + index] = functools.partial(content, index)
                self._names[first + index] = name
            list(pool.map(self._open, range(first, first + len(source))))
            return
        for begin in range(0, len(source), _BATCH):
            rows = np.arange(begin, min(begin + _BATCH, len(source)))
            images = source.read(rows).permute(0, 2, 3, 1).contiguous().numpy()
            for row, pixels in zip(rows.tolist(), images, strict=True):
                image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3])
                self._fill(first + row, image, image.size)

    def confirm(self, pool: ThreadPoolExecutor) -> None:
        """Decode in full what was shrunk in decoding and looked the same: the detail that was lost may differ."""
        times = Counter(self.pixels)
        rows = [int(row) for row in np.flatnonzero(self._shrunk) if times[self.pixels[row]] > 1]

        def again(row: int) -> None:
            image, _ = read_upright(_bytes(self.files[row]()), None, self._max_pixels, self._names[row])
            self.pixels[row] = _pixel_digest(image)

        list(pool.map(again, rows))

    def _open(self, row: int) -> None:
        data = _bytes(self.files[row]())
        self.content[row] = _digest(data)
        self._fill(row, *read_upright(data, 2 * SIDE, self._max_pixels, self._names[row]))

    def _fill(self, row: int, image: Image.Image, size: tuple[int, int]) -> None:
        """Take an "L" or "RGB" picture that was `size` (width, height) before it was shrunk in decoding."""
        self.sizes[row] = size
        self._shrunk[row] = image.size != size
        self.pixels[row] = _pixel_digest(image)
        # "Box" averages exactly what lies under a pixel; a smoother filter only helps where a picture grows.
        grows = min(image.size) < SIDE
        small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR if grows else Image.Resampling.BOX)
        self.grey[row] = np.asarray(small.convert("L"))
        self.colour[row] = np.asarray(small.convert("RGB").resize((COLOURS, COLOURS), Image.Resampling.BOX))


def _encoded(source: Source) -> Callable[[int], str | bytes] | None:
    """Return what gives the path or the bytes of a picture's file; None where there is no file."""
    paths = getattr(source, "paths", None)
    if paths is not None:
        return list(paths).__getitem__
    pictures = getattr(source, "pictures", None)
    content: Callable[[int], str | bytes] | None = getattr(pictures, "content", None)
    return content


def _bytes(content: str | bytes) -> bytes:
    if isinstance(content, bytes):
        return content
    with open(content, "rb") as file:  # noqa: PTH123 - may be no text
        return file.read()


def _pixel_digest(image: Image.Image) -> bytes:
    return _digest(f"{image.mode} {image.size}".encode() + image.tobytes())


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def label_names(source: Source, class_names: list[str]) -> list[str]:
    """Return the class of each picture of a split, or its classes joined by `+`."""
    if source.labels.ndim == 1:
        return [class_names[label] for label in source.labels.tolist()]
    return [" + ".join(class_names[k] for k in np.flatnonzero(row)) for row in source.labels]


def thumbnail(sets: DataSets, views: Views, row: int, side: int) -> Image.Image:
    """Return picture `row`, as the model gets it, no larger than `side` pixels; small ones in whole multiples."""
    source: Source = getattr(sets, SPLITS[int(views.splits[row])])
    pixels = source.read(views.positions[row : row + 1])[0].permute(1, 2, 0).numpy()
    return shown(pixels, side)


def shown(pixels: NDArray[np.uint8], side: int) -> Image.Image:
    """Return uint8 `(H, W, C)` as a square picture for the page, small ones in whole multiples up to `side`."""
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]))
    if 2 * image.width > side:
        return image.resize((side, side), Image.Resampling.BICUBIC)
    times = side // image.width
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
