"""Every kind of file that a user's folder may hold, each with what must become of it (RELIABILITY.md 2.2, I1 to I11).

As a script, `python ugly.py FOLDER SEED COUNT`, it reads files with flipped bits and prints what became of them.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import resource
import socket
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

RED, GREEN, BLUE, GREY, WHITE = (220, 30, 20), (20, 200, 40), (30, 40, 210), (128, 128, 128), (255, 255, 255)
QUADRANTS = (RED, GREEN, BLUE, GREY)
"""Colours of the usual picture: top left, top right, bottom left, bottom right."""

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


@dataclasses.dataclass(frozen=True)
class Ugly:
    """One file.

    `verdict` is `read` (then `quadrants` are its four colours, within `tolerance`), `bad` (then `reason` is part of
    the message) or `ignored`.
    """

    name: str
    row: str
    verdict: str
    quadrants: tuple = QUADRANTS
    tolerance: int = 0
    reason: str = ""
    frames: bool = False


def quadrants(colours=QUADRANTS, side=32, mode="RGB"):
    image = Image.new(mode, (side, side))
    half = side // 2
    for colour, corner in zip(colours, ((0, 0), (half, 0), (0, half), (half, half)), strict=True):
        image.paste(colour, (*corner, corner[0] + half, corner[1] + half))
    return image


def png(width, height, depth, colour_type, rows):
    """A PNG by hand, of kinds that Pillow does not write."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(image, kind, **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def noise(side=128):
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _damaged(folder):
    for kind, end in (
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("GIF", "gif"),
        ("WEBP", "webp"),
        ("TIFF", "tif"),
        ("BMP", "bmp"),
    ):
        whole = encoded(noise(), kind)
        (folder / f"cut.{end}").write_bytes(whole[: len(whole) // 2])
        yield Ugly(f"cut.{end}", "I1", "bad")
    (folder / "empty.jpg").write_bytes(b"")
    yield Ugly("empty.jpg", "I1", "bad", reason="empty file")
    (folder / "page.jpg").write_bytes(b"<!DOCTYPE html><html><body>404 Not Found</body></html>")
    yield Ugly("page.jpg", "I1", "bad", reason="not a picture")
    (folder / "header.png").write_bytes(encoded(noise(), "PNG")[:33])
    yield Ugly("header.png", "I1", "bad")
    (folder / "header.jpg").write_bytes(encoded(noise(), "JPEG")[:20])
    yield Ugly("header.jpg", "I1", "bad")
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    yield Ugly("script.png", "I1", "bad", reason="not a picture")


def _modes(folder):
    image = quadrants()
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    yield Ugly("cmyk.jpg", "I3", "read", tolerance=8)
    image.convert("CMYK").save(folder / "cmyk.tif")
    yield Ugly("cmyk.tif", "I3", "read", tolerance=1)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    palette.save(folder / "palette.png")
    yield Ugly("palette.png", "I3", "read")
    palette.save(folder / "hole.png", transparency=palette.getpixel((0, 0)))
    yield Ugly("hole.png", "I3", "read", (WHITE, *QUADRANTS[1:]))
    clear = quadrants(((220, 30, 20, 0), (20, 200, 40, 255), (0, 0, 0, 128), (0, 0, 0, 0)), mode="RGBA")
    clear.save(folder / "rgba.png")
    yield Ugly("rgba.png", "I3", "read", (WHITE, GREEN, (127, 127, 127), WHITE), tolerance=1)
    quadrants(((0, 0), (0, 255), (0, 128), (200, 255)), mode="LA").save(folder / "la.png")
    yield Ugly("la.png", "I3", "read", (WHITE, (0,) * 3, (127,) * 3, (200,) * 3), tolerance=1)
    bits = quadrants((1, 0, 0, 1), mode="1")
    for end in ("png", "tif"):
        bits.save(folder / f"bit.{end}")
        yield Ugly(f"bit.{end}", "I3", "read", (WHITE, (0,) * 3, (0,) * 3, WHITE))
    quadrants(tuple(range(0, 256, 85)), mode="L").save(folder / "grey.bmp")
    yield Ugly("grey.bmp", "I3", "read", tuple((v,) * 3 for v in range(0, 256, 85)))


def _deep(folder):
    values = (0, 20000, 40000, 65535)
    expected = tuple((round(v / 257),) * 3 for v in values)
    deep = np.array(quadrants((0, 85, 170, 255), mode="L"))
    deep = np.choose(deep // 85, values).astype(np.uint16)
    for end in ("png", "tif"):
        Image.fromarray(deep).save(folder / f"deep.{end}")
        yield Ugly(f"deep.{end}", "I4", "read", expected)
    rgb = np.array(quadrants()).astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    (folder / "deep_rgb.png").write_bytes(png(32, 32, 16, 2, rows))
    yield Ugly("deep_rgb.png", "I4", "read")
    rows = b"".join(b"\0" + np.stack([row, np.full_like(row, 65535)], 1).astype(">u2").tobytes() for row in deep)
    (folder / "deep_la.png").write_bytes(png(32, 32, 16, 4, rows))
    yield Ugly("deep_la.png", "I4", "read", expected, tolerance=1)
    Image.fromarray(deep.astype(np.float32) / 65535).save(folder / "float.tif")
    yield Ugly("float.tif", "I4", "bad", reason="floating-point")
    Image.fromarray(np.full((8, 8), 10**6, np.int32)).save(folder / "wide.tif")
    yield Ugly("wide.tif", "I4", "bad", reason="32-bit values")


def _moving(folder):
    frames = [quadrants(), quadrants((BLUE,) * 4), quadrants((GREEN,) * 4)]
    more = {"save_all": True, "append_images": frames[1:]}
    for name, settings in (("gif", {}), ("webp", {"lossless": True}), ("png", {}), ("tif", {})):
        frames[0].save(folder / f"moving.{name}", **more, **settings)
        yield Ugly(f"moving.{name}", "I5", "read", frames=True)


def _lone(folder):
    """What only looks like several pictures, or like a picture."""
    views = {"save_all": True, "append_images": [quadrants((BLUE,) * 4)], "quality": 95, "subsampling": 0}
    quadrants().save(folder / "stereo.jpg", "MPO", **views)
    yield Ugly("stereo.jpg", "I5", "read", tolerance=8)
    (folder / "folder.png").mkdir()
    quadrants().save(folder / "folder.png" / "inner.png")
    yield Ugly("folder.png/inner.png", "I7", "read")


def _bombs(folder):
    (folder / "bomb.png").write_bytes(png(40_000, 40_000, 8, 2, b"\0" * 1000))
    yield Ugly("bomb.png", "I6", "bad", reason="1600000000 pixels, more than data.max_pixels")
    (folder / "warned.png").write_bytes(png(10_000, 9_000, 1, 0, b"\0" * 1251 * 9000))
    yield Ugly("warned.png", "I6", "bad", reason="10000 × 9000 pixels")
    small = bytearray(encoded(quadrants(), "GIF"))
    small[6:10] = struct.pack("<HH", 65535, 65535)
    (folder / "bomb.gif").write_bytes(small)
    yield Ugly("bomb.gif", "I6", "bad", reason="4294836225 pixels, more than data.max_pixels")


def _links(folder):
    (folder / "loop").symlink_to(folder)
    (folder / "up").symlink_to(folder.parent)
    (folder / "self.png").symlink_to(folder / "self.png")
    yield Ugly("self.png", "I7", "bad", reason="symbolic links")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    yield Ugly("gone.png", "I7", "bad", reason="No such file")
    os.mkfifo(folder / "fifo.png")
    yield Ugly("fifo.png", "I8", "bad", reason="not a regular file")
    # A socket's name may have 100 bytes: bound by a relative one.
    here = Path.cwd()
    os.chdir(folder)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.png")
    os.chdir(here)
    yield Ugly("socket.png", "I8", "bad", reason="not a regular file")
    (folder / "zero.png").symlink_to("/dev/zero")
    yield Ugly("zero.png", "I8", "bad", reason="not a regular file")


def _names(folder):
    whole = encoded(quadrants(), "PNG")
    names = [
        "köttur 猫.png",
        "ko\u0308ttur.png",
        "new\nline.png",
        os.fsdecode(b"\xff\xfe.png"),
        "-rf $HOME 'q' \"r\".png",
    ]
    for name in [*names, "n" * 251 + ".png", "UPPER.PNG", "\x1b[31mred.png", "a,b;c=[d].png"]:
        (folder / name).write_bytes(whole)
        yield Ugly(name, "I9", "read")
    for name in ("._x.png", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt", "no_extension"):
        (folder / name).write_bytes(whole)
        yield Ugly(name, "I10", "ignored")
    for name in (".git", "__MACOSX"):
        (folder / name).mkdir()
        (folder / name / "x.png").write_bytes(whole)
        yield Ugly(f"{name}/x.png", "I10", "ignored")


def _turned(folder):
    tl, tr, bl, br = QUADRANTS
    seen = {1: (tl, tr, bl, br), 2: (tr, tl, br, bl), 3: (br, bl, tr, tl), 4: (bl, br, tl, tr)}
    seen |= {5: (tl, bl, tr, br), 6: (bl, tl, br, tr), 7: (br, tr, bl, tl), 8: (tr, br, tl, bl)}
    for orientation, colours in seen.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        quadrants().save(folder / f"turned{orientation}.jpg", exif=exif, quality=95, subsampling=0)
        yield Ugly(f"turned{orientation}.jpg", "I11", "read", colours, tolerance=8)
    for name, exif in {
        "exif_cut.jpg": b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12",
        "exif_wild.jpg": b"Exif\0\0MM\0*\xff\xff\xff\xff",
        "exif_99.jpg": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
    }.items():
        quadrants().save(folder / name, exif=exif, quality=95, subsampling=0)
        yield Ugly(name, "I11", "read", tolerance=8)


def _odd(folder):
    (folder / "png_called.jpg").write_bytes(encoded(quadrants(), "PNG"))
    yield Ugly("png_called.jpg", "I1", "read")
    quadrants().save(folder / "progressive.jpeg", quality=95, subsampling=0, progressive=True)
    yield Ugly("progressive.jpeg", "I1", "read", tolerance=8)
    whole = encoded(quadrants(), "JPEG", quality=95, subsampling=0)
    (folder / "tail.jpg").write_bytes(whole + b"appended by a phone" * 9)
    yield Ugly("tail.jpg", "I1", "read", tolerance=8)
    quadrants().save(folder / "colours.jpg", quality=95, subsampling=0, icc_profile=b"no profile at all")
    yield Ugly("colours.jpg", "I1", "read", tolerance=8)
    Image.new("RGB", (1, 1), RED).save(folder / "one.png")
    yield Ugly("one.png", "I6", "read", (RED,) * 4)
    for size in ((20_000, 2), (2, 20_000)):
        Image.new("RGB", size, GREEN).save(folder / f"thin{size[0]}.png")
        yield Ugly(f"thin{size[0]}.png", "I6", "read", (GREEN,) * 4)


def write(folder: Path) -> list[Ugly]:
    """Fill `folder`, a class of an image folder; return what became of each file, by its name in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = (_damaged, _modes, _deep, _moving, _lone, _bombs, _links, _names, _turned, _odd)
    return [ugly for part in parts for ugly in part(folder)]


def tree_hash(root) -> str:
    """A digest of every name, kind, time, size, link target and content below `root`."""
    digest = hashlib.sha256()
    for path in sorted(Path(root).rglob("*")):
        status = path.lstat()
        digest.update(os.fsencode(path) + repr((status.st_mode, status.st_mtime_ns, status.st_size)).encode())
        if path.is_symlink():
            digest.update(os.fsencode(path.readlink()))
        elif path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _smooth(side=48):
    y, x = np.mgrid[0:side, 0:side] * (255 / (side - 1))
    return Image.fromarray(np.stack([y, x, (x + y) / 2], 2).astype(np.uint8))


def flip_bits(folder: Path, seed: int, count: int) -> dict:
    """Read `count` files with one flipped bit each, in six formats in turn, as training and as the check do."""
    from cvtrain.data.picture import check_picture, read_picture
    from cvtrain.errors import DataError

    warnings.simplefilter("ignore")
    chance = random.Random(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    settings = {"TIFF": {"compression": "tiff_lzw"}, "WEBP": {"quality": 80}}
    answer = {kind: {"read": 0, "refused": 0} for kind in FORMATS}
    slowest = 0.0
    for number in range(count):
        kind, end = list(FORMATS.items())[number % len(FORMATS)]
        data = bytearray(encoded(_smooth(), kind, **settings.get(kind, {})))
        # Half of them in the header, where sizes and counts stand.
        bit = chance.randrange(8 * (64 if number % 2 else len(data)))
        data[bit // 8] ^= 1 << bit % 8
        path = folder / f"flipped.{end}"
        path.write_bytes(data)
        began = time.monotonic()
        try:
            read = read_picture(str(path), 16, 3)
            if read.shape != (3, 16, 16):
                raise RuntimeError(f"{kind}, bit {bit}: {read.shape}")
            answer[kind]["read"] += 1
        except DataError as error:
            if str(path) not in str(error):
                raise RuntimeError(f"{kind}, bit {bit}: {error}") from error
            answer[kind]["refused"] += 1
        with contextlib.suppress(DataError):
            check_picture(str(path))
        slowest = max(slowest, time.monotonic() - began)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"formats": answer, "grown_mb": grown // 1024, "slowest": slowest}


if __name__ == "__main__":
    print(json.dumps(flip_bits(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
