"""Folders of pictures of any origin: layout, splits, and what each kind of file becomes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cvtrain.core.types import Preprocess
from cvtrain.data import EncodedSource, Folder, Loader, LoaderConfig, printable, read_picture
from cvtrain.errors import ConfigError, DataError


def save(path, colour=(200, 100, 50), size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def fill(root, counts):
    """Write counts[class] pictures, each of a colour of its own."""
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            save(root / name / f"{i:02}.png", (40 * number, i, 0))
    return root


def load(root, **changes):
    data = Folder(**{"root": str(root), **changes})
    return data.load(8, 1.0, 2), data


def snapshot(root):
    return sorted((str(p), p.lstat().st_mtime_ns, p.lstat().st_size) for p in root.rglob("*"))


def test_one_folder_is_split_by_ratio_without_overlap_and_never_written_to(tmp_path):
    fill(tmp_path, {"cat": 20, "dog": 10})
    before = snapshot(tmp_path)
    sets, data = load(tmp_path)
    assert sets.class_names == ["cat", "dog"]
    assert sets.counts() == {"train": 21, "val": 3, "test": 6, "skipped": 0}
    assert np.bincount(sets.test.labels).tolist() == [4, 2]
    names = [name for split in data.splits.values() for name in split]
    assert sorted(names) == sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png"))
    assert snapshot(tmp_path) == before
    assert data.splits == load(tmp_path)[1].splits
    assert data.splits != load(tmp_path, split_seed=1)[1].splits


def test_labels_go_with_their_pictures(tmp_path):
    sets, _ = load(fill(tmp_path, {"a": 10, "b": 10, "c": 10}))
    for source in (sets.train, sets.val, sets.test):
        pixels = source.read(np.arange(len(source)))
        assert pixels[:, 0, 0, 0].tolist() == [40 * label for label in source.labels.tolist()]
        assert [name[0] for name in source.names] == [sets.class_names[label] for label in source.labels]


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_folders_are_taken_as_they_are_and_mapped_by_name(tmp_path, val):
    fill(tmp_path / "train", {"a": 4, "b": 4})
    fill(tmp_path / val, {"b": 2})
    save(tmp_path / "test" / "a" / "deep" / "er" / "x.JPG")
    sets, data = load(tmp_path)
    assert sets.counts() == {"train": 8, "val": 2, "test": 1, "skipped": 0}
    assert sets.val.labels.tolist() == [1, 1]
    assert sets.test.names == ["test/a/deep/er/x.JPG"]
    assert any("val has no picture of 1 class(es): a" in note for note in sets.notes)
    assert data.splits["val"] == [f"{val}/b/00.png", f"{val}/b/01.png"]


def test_a_split_without_a_folder_is_carved_from_train_and_noted(tmp_path):
    fill(tmp_path / "train", {"a": 20, "b": 20})
    fill(tmp_path / "test", {"a": 2, "b": 2})
    sets, _ = load(tmp_path)
    assert sets.counts() == {"train": 36, "val": 4, "test": 4, "skipped": 0}
    assert any("0.1 for val" in note for note in sets.notes)


def test_a_class_called_train_beside_other_vehicles_is_a_class(tmp_path):
    sets, _ = load(fill(tmp_path, {"car": 5, "plane": 5, "train": 5}))
    assert sets.class_names == ["car", "plane", "train"]


def test_a_class_in_val_that_train_lacks_stops_by_name(tmp_path):
    fill(tmp_path / "train", {"a": 4, "b": 4})
    fill(tmp_path / "val", {"a": 1, "zebra": 1})
    with pytest.raises(DataError, match="class 'zebra' is in val but not in train"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda root: None, "holds no class folders: it is empty"),
        (lambda root: save(root / "x.png"), r"1 picture\(s\) lie directly in it"),
        (lambda root: fill(root, {"only": 5}), r"one class \(only\)"),
        (lambda root: (fill(root, {"a": 5, "b": 5}), (root / "c").mkdir()), "class 'c' holds no picture"),
        (lambda root: fill(root / "val", {"a": 5, "b": 5}), "holds val but no train"),
        (
            lambda root: (fill(root / "train", {"a": 5}), (root / "val").mkdir(), (root / "valid").mkdir()),
            "both val and valid",
        ),
        (lambda root: root.rmdir(), "No such file or directory"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_says_what_was_found(tmp_path, build, text):
    root = tmp_path / "pictures"
    root.mkdir()
    build(root)
    with pytest.raises(DataError, match=text) as error:
        load(root)
    assert error.value.exit_code == 3


def test_a_folder_that_is_not_given_and_settings_out_of_range_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.root=DIR"):
        Folder()
    for changes in ({"channels": 4}, {"on_error": "ignore"}, {"max_bad": 2.0}, {"max_pixels": 10**12}):
        with pytest.raises(ConfigError, match="allowed"):
            Folder(root=str(tmp_path), **changes)


def test_hidden_and_system_files_are_ignored_and_other_files_noted(tmp_path):
    fill(tmp_path, {"a": 5, "b": 5})
    for name in ("._00.png", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt"):
        (tmp_path / "a" / name).write_bytes(b"junk")
    save(tmp_path / ".hidden" / "x.png")
    sets, _ = load(tmp_path)
    assert sum(sets.counts().values()) == 10
    assert sets.class_names == ["a", "b"]
    assert any("1 file(s)" in note and "notes.txt" in note for note in sets.notes)


def test_links_in_circles_count_every_picture_once(tmp_path):
    fill(tmp_path, {"a": 6, "b": 6})
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "one").symlink_to(tmp_path / "b" / "two")
    (tmp_path / "b" / "two").symlink_to(tmp_path / "b" / "one")
    sets, _ = load(tmp_path)
    assert sum(sets.counts().values()) == 12


def test_fifos_dangling_links_and_damaged_files_are_all_listed_before_training(tmp_path):
    fill(tmp_path, {"a": 5, "b": 5})
    os.mkfifo(tmp_path / "a" / "fifo.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "b" / "empty.jpg").write_bytes(b"")
    (tmp_path / "b" / "page.jpg").write_bytes(b"<html>404</html>")
    whole = save(tmp_path / "b" / "cut.jpg", size=(300, 300)).read_bytes()
    (tmp_path / "b" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as error:
        load(tmp_path)
    text = str(error.value)
    assert "5 of 15 pictures cannot be read" in text
    for part in (
        "fifo.png: not a regular file",
        "gone.png: No such file",
        "empty.jpg: empty file",
        "data.on_error=skip",
    ):
        assert part in text
    assert "page.jpg: not a picture" in text
    assert "cut.jpg: image file is truncated" in text

    sets, _ = load(tmp_path, on_error="skip", max_bad=0.5)
    assert sets.skipped == 5
    assert sum(sets.counts().values()) == 15
    with pytest.raises(DataError, match=r"more than data\.max_bad=0\.01"):
        load(tmp_path, on_error="skip")


def test_a_damaged_file_moves_no_other_file_to_another_split(tmp_path):
    fill(tmp_path, {"a": 20, "b": 20})
    _, before = load(tmp_path)
    (tmp_path / "a" / "07.png").write_bytes(b"")
    _, after = load(tmp_path, on_error="skip", max_bad=0.5)
    for split in ("train", "val", "test"):
        assert [name for name in before.splits[split] if name != "a/07.png"] == after.splits[split]


def test_a_class_of_which_nothing_is_readable_stops(tmp_path):
    fill(tmp_path, {"a": 50, "b": 3})
    for path in (tmp_path / "b").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"no readable training picture of 1 class\(es\): b"):
        load(tmp_path, on_error="skip", max_bad=0.5)


def test_names_that_are_no_text_or_hold_a_newline_are_read_and_printed_on_one_line(tmp_path):
    fill(tmp_path, {"köttur": 5, "b": 5})
    (tmp_path / "b" / "00.png").rename(tmp_path / "b" / os.fsdecode(b"\xff\xfe.png"))
    (tmp_path / "b" / "01.png").rename(tmp_path / "b" / "new\nline.png")
    sets, data = load(tmp_path)
    names = [name for split in data.splits.values() for name in split]
    assert "b/\\xff\\xfe.png" in names
    assert "b/new\\nline.png" in names
    assert sets.class_names == ["b", "köttur"]
    assert all(name.encode("utf-8") and name.isprintable() for name in names)
    assert printable("ok/ü.png") == "ok/ü.png"


def test_pictures_that_do_not_fit_the_cache_are_read_on_demand_with_equal_pixels(tmp_path):
    fill(tmp_path, {"a": 10, "b": 10})
    cached, _ = load(tmp_path)
    lazy, _ = load(tmp_path, cache_mb=0)
    assert isinstance(lazy.train, EncodedSource)
    assert lazy.train.names == cached.train.names
    where = np.array([3, 0, 9])
    assert torch.equal(lazy.train.read(where), cached.train.read(where))
    made = Loader(lazy, LoaderConfig(4, 0, torch.device("cpu"), workers=2))
    assert made.mode == "host"
    Path(tmp_path / lazy.train.names[5]).write_bytes(b"")
    with pytest.raises(DataError, match=lazy.train.names[5]):
        list(made.train_batches(0))


def test_without_img_size_a_folder_is_read_at_224_with_imagenets_statistics(tmp_path):
    fill(tmp_path, {"a": 5, "b": 5})
    rgb = Folder(root=str(tmp_path)).load(None, 1.14, 2)
    assert rgb.preprocess == Preprocess(224, 255, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    grey = Folder(root=str(tmp_path), channels=1).load(32, 1.0, 2)
    assert grey.preprocess == Preprocess(32, 32, 1, (0.5,), (0.5,))
    assert tuple(grey.train.read(np.arange(2)).shape[1:]) == (1, 32, 32)


def pixel(path, channels=3):
    return read_picture(str(path), 4, channels)[:, 1, 1].tolist()


def test_every_mode_becomes_rgb_with_transparency_over_white(tmp_path):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    cases = {
        "cmyk.jpg": (red.convert("CMYK"), [255, 0, 0], 6),
        "palette.png": (red.convert("P", palette=Image.Palette.ADAPTIVE), [255, 0, 0], 0),
        "clear.png": (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), [255, 255, 255], 0),
        "half.png": (Image.new("RGBA", (8, 8), (255, 0, 0, 128)), [255, 127, 127], 1),
        "la.png": (Image.new("LA", (8, 8), (0, 0)), [255, 255, 255], 0),
        "bit.png": (Image.new("1", (8, 8), 1), [255, 255, 255], 0),
        "grey.png": (Image.new("L", (8, 8), 77), [77, 77, 77], 0),
    }
    for name, (image, expected, tolerance) in cases.items():
        image.save(tmp_path / name)
        assert np.abs(np.subtract(pixel(tmp_path / name), expected)).max() <= tolerance, name
    clear = red.convert("P", palette=Image.Palette.ADAPTIVE)
    clear.save(tmp_path / "hole.png", transparency=0)
    assert pixel(tmp_path / "hole.png") == [255, 255, 255]
    assert pixel(tmp_path / "grey.png", channels=1) == [77]


@pytest.mark.parametrize("value", [0, 257, 30000, 65535])
@pytest.mark.parametrize("end", ["png", "tif"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, value, end):
    path = tmp_path / f"deep.{end}"
    Image.fromarray(np.full((8, 8), value, np.uint16)).save(path)
    assert pixel(path) == [round(value / 257)] * 3


def test_32_bit_and_floating_point_pictures_are_refused_with_the_fix(tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif: floating-point values.*save it as 8 or 16 bits"):
        pixel(tmp_path / "float.tif")
    Image.fromarray(np.full((8, 8), 10**6, np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(DataError, match="32-bit values from 1000000"):
        pixel(tmp_path / "wide.tif")


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for end in ("gif", "webp", "png"):
        path = tmp_path / f"moving.{end}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if end == "webp" else {}))
        assert pixel(path) == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_as_pillow_does(tmp_path, orientation):
    from PIL import ImageOps

    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    expected = np.array(ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")))
    read = read_picture(str(tmp_path / "turned.png"), 8, 3).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(read, expected)
    assert np.array_equal(read, pixels) == (orientation == 1)


def test_damaged_exif_does_not_make_a_picture_unreadable(tmp_path):
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert pixel(tmp_path / "x.jpg") == [9, 9, 9]


def test_a_picture_beyond_the_limit_of_pixels_is_refused_by_its_header(tmp_path):
    save(tmp_path / "big.png", size=(100, 50))
    assert read_picture(str(tmp_path / "big.png"), 4, 3, max_pixels=5000).shape == (3, 4, 4)
    with pytest.raises(DataError, match=r"100 × 50 pixels, more than data\.max_pixels=4999"):
        read_picture(str(tmp_path / "big.png"), 4, 3, max_pixels=4999)


def test_a_bomb_in_pillows_warning_band_is_an_error_here(tmp_path):
    fill(tmp_path, {"a": 5, "b": 5})
    Image.new("1", (10_000, 9_000)).save(tmp_path / "a" / "bomb.png")
    with pytest.raises(DataError, match="10000 × 9000 pixels"):
        load(tmp_path)


def test_a_postscript_file_never_reaches_ghostscript(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    with pytest.raises(DataError, match="not a picture in any format that is opened"):
        pixel(tmp_path / "x.png")


def test_a_png_with_one_flipped_bit_is_read_or_refused_and_never_crashes(tmp_path):
    save(tmp_path / "x.png", size=(12, 12))
    whole = (tmp_path / "x.png").read_bytes()
    refused = 0
    for position in range(0, len(whole) * 8, 5):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << (position % 8)
        (tmp_path / "x.png").write_bytes(damaged)
        try:
            assert read_picture(str(tmp_path / "x.png"), 4, 3).shape == (3, 4, 4)
        except DataError:
            refused += 1
    assert refused > 0


def test_the_short_side_is_resized_and_the_centre_cropped_as_pillow_does(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    whole = Image.fromarray(pixels).resize((16, 10), Image.Resampling.BILINEAR).crop((3, 0, 13, 10))
    np.testing.assert_array_equal(
        read_picture(str(tmp_path / "x.png"), 10, 3).permute(1, 2, 0).numpy(), np.array(whole)
    )
