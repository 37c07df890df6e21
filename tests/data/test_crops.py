"""Random resized crops taken while a picture is decoded: the same boxes and pixels as cutting the decoded picture."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cvtrain.aug import Augmentation, HorizontalFlip, RandomResizedCrop
from cvtrain.data import Folder, Loader, LoaderConfig
from cvtrain.data.picture import read_crop

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


def batches(sets, workers=0, start=0, epoch=3, img_size=16):
    made = Loader(sets, LoaderConfig(4, 7, CPU, workers=workers), AUGMENTATION.crop)
    return list(made.train_batches(epoch, start, img_size))


def test_the_loader_crops_every_picture_where_the_augmentation_would(sets):
    for batch in batches(sets):
        assert batch.cropped
        for picture, index in zip(batch.images, batch.indices.tolist(), strict=True):
            image = Image.open(sets.train.paths[index])
            box = AUGMENTATION.crop(7, 3, index, (image.height, image.width))
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
