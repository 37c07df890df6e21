"""The second JPEG decoder gives Pillow's pixels to the bit, or leaves the file to Pillow."""

import functools
import io
import itertools
import json
import random
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from cvtrain.core import jpeg, picture
from cvtrain.errors import DataError

simplejpeg = pytest.importorskip("simplejpeg")

SIZES = ((16, 16), (33, 47), (65, 130), (17, 200))
SAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")


def photo(width, height, seed=0):
    """Slopes, an edge and noise: every coefficient of a block is used."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    slopes = np.stack([x * 3 + y, 255 - y * 2, np.where(x + y < width, 40, 220)], 2)
    pixels = slopes + rng.normal(0, 25, slopes.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encoded(image, **settings):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, "subsampling": "4:2:0", **settings})
    return file.getvalue()


def opened(data, scale=1):
    image = Image.open(io.BytesIO(data))
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
        assert image.decoderconfig[0] == scale
    return image


def outcome(read):
    """Return the pixels that `read` gives, or what it says when it refuses."""
    try:
        pixels = read()
    except DataError as error:
        return str(error)
    return pixels.shape, pixels.tobytes()


@pytest.fixture
def without(monkeypatch):
    """A function that does something as if simplejpeg were not installed."""

    def doing(read):
        with monkeypatch.context() as patch:
            patch.setattr(jpeg, "_decoder", lambda: None)
            return read()

    return doing


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_usual_kind_has_pillows_pixels_at_every_scale(sampling, progressive):
    for size, quality, restart in itertools.product(SIZES, (100, 75, 20), (0, 3)):
        settings = {"quality": quality, "progressive": progressive, "restart_marker_blocks": restart}
        data = encoded(photo(*size), subsampling=sampling, **settings)
        for scale in (1, 2, 4, 8):
            pixels = jpeg.decoded(opened(data, scale), 10**6)
            assert pixels is not None
            assert pixels.flags.writeable
            np.testing.assert_array_equal(pixels, np.asarray(opened(data, scale)))


def test_saturated_noise_and_rgb_and_foreign_markers_have_pillows_pixels():
    hard = Image.fromarray(np.random.default_rng(1).choice(np.array([0, 255], np.uint8), (120, 90, 3)))
    files = [encoded(hard, quality=quality, subsampling=kind) for quality in (1, 100) for kind in SAMPLINGS]
    files += [encoded(hard, keep_rgb=True, subsampling="4:4:4"), encoded(hard, optimize=True, comment=b"x" * 999)]
    files += [encoded(hard, icc_profile=b"p" * 70_000, dpi=(72, 72)), encoded(hard) + b"appended by a phone" * 9]
    for data, scale in itertools.product(files, (1, 2, 4, 8)):
        pixels = jpeg.decoded(opened(data, scale), 10**6)
        assert pixels is not None
        np.testing.assert_array_equal(pixels, np.asarray(opened(data, scale)))


def test_other_kinds_are_left_to_pillow_which_loads_them_as_if_nothing_had_happened():
    pixels = np.asarray(photo(60, 40))
    rare = [simplejpeg.encode_jpeg(pixels, 90, "RGB", kind) for kind in ("440", "411")]
    rare += [encoded(photo(60, 40).convert(mode)) for mode in ("L", "CMYK")]
    rare += [encoded(photo(60, 15)), encoded(photo(60, 40))[:-300], encoded(photo(60, 40))[:-2]]
    for data in rare:
        image = opened(data)
        assert jpeg.decoded(image, 10**6) is None
        again = opened(data)
        assert outcome_of_loading(image) == outcome_of_loading(again)
    png = io.BytesIO()
    photo(60, 40).save(png, "PNG")
    assert jpeg.decoded(Image.open(png), 10**6) is None


def outcome_of_loading(image):
    try:
        return np.asarray(image).tobytes()
    except OSError as error:
        return str(error)


def lossless(side):
    """A JPEG of ITU-T T.81's annex H by hand: every difference is nought, so that it is grey all over."""
    table = b"\xff\xc4\x00\x14\x00\x01" + bytes(15) + b"\x00"
    size = side.to_bytes(2)
    frame = b"\xff\xc3\x00\x11\x08" + size + size + b"\x03\x01\x11\x00\x02\x11\x00\x03\x11\x00"
    scan = b"\xff\xda\x00\x0c\x03\x01\x00\x02\x00\x03\x00\x01\x00\x00" + bytes(-(-3 * side * side // 8))
    return b"\xff\xd8" + table + frame + scan + b"\xff\xd9"


def test_a_lossless_jpeg_whose_scale_no_decoder_changes_is_left_to_pillow():
    data = lossless(64)
    # It is one indeed, and only in full size may simplejpeg be asked.
    assert (simplejpeg.decode_jpeg(data, "RGB") == 128).all()
    assert jpeg.decoded(opened(data), 10**6) is None
    assert jpeg.decoded(opened(data, 4), 10**6) is None


def test_a_file_larger_than_its_header_said_takes_no_memory():
    image = opened(encoded(photo(64, 64)))
    image.fp = io.BytesIO(encoded(photo(128, 128)))
    assert jpeg.decoded(image, 10**6) is None


def test_a_crop_that_ends_far_above_the_bottom_of_a_large_file_is_pillows_which_stops_there():
    small, large = encoded(photo(64, 100)), encoded(photo(500, 600), quality=100)
    assert len(small) < jpeg._STOPS < len(large)
    assert jpeg.decoded(opened(large), 200) is None
    assert jpeg.decoded(opened(large), 600) is not None
    assert jpeg.decoded(opened(small), 30) is not None


def test_a_decoder_that_gives_other_pixels_or_cannot_be_imported_is_not_used(monkeypatch):
    def shifted(*args, **settings):
        return simplejpeg.decode_jpeg(*args, **settings) ^ 1

    def quick(*args, **settings):
        return simplejpeg.decode_jpeg(*args, **settings, fastupsample=True)

    for other in (types.SimpleNamespace(decode_jpeg=shifted), types.SimpleNamespace(decode_jpeg=quick), None):
        monkeypatch.setitem(sys.modules, "simplejpeg", other)
        assert jpeg._decoder.__wrapped__() is None
    monkeypatch.setitem(sys.modules, "simplejpeg", simplejpeg)
    assert jpeg._decoder.__wrapped__() is simplejpeg.decode_jpeg


def test_boxes_of_pictures_of_every_kind_are_the_same_without_it(without, monkeypatch, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"exif": turned}, {"restart_marker_rows": 1}]
    files = [encoded(photo(241, 157), **settings) for settings in kinds] + [encoded(photo(241, 157).convert("L"))]
    used, real = [], jpeg._attempt
    monkeypatch.setattr(jpeg, "_attempt", lambda *args: used.append(real(*args)) or used[-1])
    chance = random.Random(0)
    for data, side in itertools.product(files, (16, 40, 100)):
        path = tmp_path / "picture.jpg"
        path.write_bytes(data)
        for content in (str(path), data):
            rows, columns = chance.randint(1, 157), chance.randint(1, 157)
            box = (chance.randint(0, 157 - rows), chance.randint(0, 157 - columns), rows, columns)
            for channels in (1, 3):
                read = functools.partial(picture.read_box, content, lambda size, box=box: box, side, channels)
                assert outcome(read) == without(functools.partial(outcome, read))
    assert sum(pixels is not None for pixels in used) >= 5


def test_a_training_crop_is_the_same_tensor_without_it(without):
    from cvtrain.data.picture import read_crop

    data = encoded(photo(300, 220))
    read = functools.partial(read_crop, data, lambda size: (30, 41, 190, 150), 96, 3)
    fast, slow = read(), without(read)
    assert jpeg.decoded(opened(data), 220) is not None
    assert fast.stride() == slow.stride()
    assert fast.equal(slow)


def test_600_files_with_a_flipped_bit_or_cut_short_are_read_or_refused_as_without_it():
    seed, count = 20261122, 600
    answer = subprocess.run(
        [sys.executable, __file__, str(seed), str(count)], capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.returncode == 0, f"seed {seed}: {answer.stderr[-2000:]}"
    told = json.loads(answer.stdout.splitlines()[-1])
    assert told["different"] == []
    # Each way out has been taken.
    assert min(told["decoded"], told["left"], told["refused"]) > 50, told


def damaged(chance):
    """Return a JPEG with one wrong bit, every fourth cut short instead."""
    settings = {"progressive": chance.random() < 0.3, "restart_marker_blocks": chance.choice((0, 2))}
    data = bytearray(encoded(photo(56, 49, chance.randrange(9)), subsampling=chance.choice(SAMPLINGS), **settings))
    if chance.random() < 0.25:
        return bytes(data[: chance.randrange(len(data))])
    # Half of them in the header, where sizes, tables and counts stand.
    bit = chance.randrange(8 * (650 if chance.random() < 0.5 else len(data)))
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def compare(seed, count):
    """Read boxes of damaged JPEGs with simplejpeg and without; a crash ends this process."""
    chance, decoder, attempt = random.Random(seed), jpeg._decoder, jpeg._attempt
    told = {"decoded": 0, "left": 0, "refused": 0, "different": []}

    def counted(*args):
        pixels = attempt(*args)
        told["left" if pixels is None else "decoded"] += 1
        return pixels

    decoder()
    jpeg._attempt = counted
    for number in range(count):
        data = damaged(chance)
        rows, side = chance.randint(4, 49), chance.choice((7, 14, 40))
        box = (49 - rows, 5, rows, 40)
        read = functools.partial(outcome, functools.partial(picture.read_box, data, lambda size, b=box: b, side, 3))
        jpeg._decoder = decoder
        fast = read()
        jpeg._decoder = lambda: None
        slow = read()
        told["refused"] += isinstance(slow, str)
        if fast != slow:
            told["different"].append(number)
    return told


if __name__ == "__main__":
    print(json.dumps(compare(int(sys.argv[1]), int(sys.argv[2]))))
