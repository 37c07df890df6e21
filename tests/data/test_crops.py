"""Random resized crops taken while a picture is decoded: the same boxes and pixels as cutting the decoded picture."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cvtrain.aug import Augmentation, HorizontalFlip, RandomResizedCrop
from cvtrain.data import ArraySource, Folder, Loader, LoaderConfig
from cvtrain.data.picture import read_crop
from cvtrain.errors import DataError

CPU = torch.device("cpu")


def photo(width, height, seed=0):
    """A smooth picture: what JPEG keeps, so that scaled decoding can be compared."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def reference(image, box, size):
    top, left, height, width = box
    cut = image.crop((left, top, left + width, top + height))
    return np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR)).astype(int)


def close(found, expected):
    return np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("box", [(0, 0, 60, 90), (13, 7, 31, 44), (59, 89, 1, 1)])
def test_a_crop_equals_pillows_resize_of_the_box_within_one_level(box, tmp_path):
    image = photo(90, 60)
    image.save(tmp_path / "x.png")
    found = read_crop(str(tmp_path / "x.png"), lambda size: box, 16, 3)
    assert close(found, reference(image, box, 16))


def test_the_chooser_is_asked_with_the_height_and_width_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(90, 60).save(tmp_path / "x.jpg", exif=exif, quality=95)
    asked = []

    def choose(size):
        asked.append(size)
        return 20, 10, 40, 30

    found = read_crop(str(tmp_path / "x.jpg"), choose, 16, 3).permute(1, 2, 0).numpy().astype(int)
    assert asked == [(90, 60)]
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "x.jpg"))
    assert np.abs(found - reference(upright, (20, 10, 40, 30), 16)).mean() < 2


@pytest.mark.parametrize("side", [640, 1500])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(side, tmp_path):
    photo(side, side).save(tmp_path / "x.jpg", quality=95)
    box = (side // 8, side // 10, side // 2, side // 2)
    found = read_crop(str(tmp_path / "x.jpg"), lambda size: box, 64, 3).permute(1, 2, 0).numpy().astype(int)
    difference = np.abs(found - reference(Image.open(tmp_path / "x.jpg"), box, 64))
    assert difference.mean() < 1.5
    assert difference.max() < 16


def test_bytes_are_read_as_files_are(tmp_path):
    photo(90, 60).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    box = (5, 5, 40, 40)
    from_file = read_crop(str(tmp_path / "x.png"), lambda size: box, 16, 3)
    assert torch.equal(read_crop(content, lambda size: box, 16, 3), from_file)


@pytest.fixture
def sets(tmp_path):
    for i in range(24):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(70 + i, 50, seed=i).save(path)
    return Folder(root=str(tmp_path / "photos"), cache="none").load(16, 1.14, 2)


CROP = RandomResizedCrop((0.2, 0.8))
AUGMENTATION = Augmentation({"cut": CROP, "flip": HorizontalFlip()})
CROPPING = AUGMENTATION.crop


def batches(sets, workers=0, start=0, epoch=3, img_size=16):
    made = Loader(sets, LoaderConfig(4, 7, CPU, workers=workers), AUGMENTATION.crop)
    return list(made.train_batches(epoch, start, img_size))


def test_the_loader_crops_every_picture_where_the_augmentation_would(sets):
    for batch in batches(sets):
        assert batch.cropped
        for picture, index in zip(batch.images, batch.indices.tolist(), strict=True):
            image = Image.open(sets.train.paths[index])
            crop = AUGMENTATION.crop
            (box,) = crop.boxes(crop.draw(7, 3, np.array([index])), (image.height, image.width))
            assert 0.15 < box[2] * box[3] / (image.height * image.width) < 0.85
            assert close(picture, reference(image, box, 16))


def test_workers_and_resumes_change_nothing_and_epochs_do(sets):
    whole = batches(sets)
    for other in (batches(sets, workers=2), batches(sets, start=2)):
        for batch, expected in zip(other, whole[-len(other) :], strict=True):
            assert torch.equal(batch.images, expected.images)
            assert batch.indices.tolist() == expected.indices.tolist()
    assert not torch.equal(batches(sets, epoch=4)[0].images, whole[0].images)


def test_a_cropped_batch_is_not_cropped_again(sets):
    batch = batches(sets)[0]
    flipped = AUGMENTATION.samples(batch.images.clone(), batch.indices, 7, 3, 16, batch.cropped)
    for picture, before in zip(flipped, batch.images, strict=True):
        assert torch.equal(picture, before) or torch.equal(picture, before.flip(-1))


def test_the_size_follows_the_phase_and_whole_squares_are_read_where_nothing_is_cropped(sets):
    assert batches(sets, img_size=9)[0].images.shape == (4, 3, 9, 9)
    whole = batches(sets, img_size=None)[0]
    assert (whole.cropped, tuple(whole.images.shape)) == (False, (4, 3, 18, 18))
    made = Loader(sets, LoaderConfig(4, 7, CPU, workers=0), AUGMENTATION.crop)
    assert not next(made.eval_batches("val")).cropped


@pytest.mark.parametrize(("mode", "workers"), [("device", 0), ("host", 0), ("host", 2)])
def test_pictures_in_memory_are_cropped_as_they_are_read_exactly_as_the_augmentation_would(sets, mode, workers):
    whole = sets.train.read(np.arange(len(sets.train)))
    positions = np.arange(len(whole))[::-1].copy()
    held = ArraySource(whole, sets.train.labels[positions], [""] * len(whole), positions)
    made = Loader(dataclasses.replace(sets, train=held), LoaderConfig(4, 7, CPU, mode=mode, workers=workers), CROPPING)
    for batch in made.train_batches(3, img_size=16):
        squares = whole[positions[batch.indices]]
        expected = AUGMENTATION.samples(squares.clone(), batch.indices, 7, 3, 16)
        result = AUGMENTATION.samples(batch.images, batch.indices, 7, 3, 16, batch.cropped)
        assert batch.cropped
        assert torch.equal(result, expected)
        assert batch.targets.tolist() == held.labels[batch.indices].tolist()


def test_reading_crops_leaves_the_pictures_in_memory_as_they_were(sets):
    whole = sets.train.read(np.arange(len(sets.train)))
    held, before = ArraySource(whole, sets.train.labels, [""] * len(whole)), whole.clone()
    box = RandomResizedCrop((1.0, 1.0), (1.0, 1.0)).chooser("full")
    held.read_crops(np.arange(4), box, 0, 0, whole.shape[-1]).fill_(0)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"subsampling": 0}], ids=["plain", "scans", "full"])
def test_a_jpeg_decoded_no_further_than_its_crop_gives_the_pixels_of_the_whole(tmp_path, monkeypatch, mode, settings):
    noise = np.random.default_rng(0).integers(0, 256, (700, 500, 3), dtype=np.uint8)
    noise[400:450] = 0
    Image.fromarray(noise).convert(mode).save(tmp_path / "x.jpg", quality=95, **settings)
    boxes = [(0, 0, 20, 500), (90, 30, 200, 300), (380, 10, 60, 90), (400, 0, 300, 300), (0, 0, 700, 500)]
    crops = [read_crop(str(tmp_path / "x.jpg"), lambda size, box=box: box, 32, 3) for box in boxes]
    monkeypatch.setattr("cvtrain.core.picture._load_down_to", lambda image, row: image.load())
    for found, box in zip(crops, boxes, strict=True):
        assert torch.equal(found, read_crop(str(tmp_path / "x.jpg"), lambda size, box=box: box, 32, 3))


def test_a_crop_of_the_top_reads_only_the_beginning_of_the_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.jpg", quality=95)
    content = (tmp_path / "x.jpg").read_bytes()
    half = content[: len(content) // 2]
    top = (0, 0, 100, 100)
    assert torch.equal(read_crop(half, lambda size: top, 64, 3), read_crop(content, lambda size: top, 64, 3))
    with pytest.raises(DataError, match="truncated"):
        read_crop(half, lambda size: (500, 0, 100, 100), 64, 3)
