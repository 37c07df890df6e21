"""SVHN, STL-10, Flowers, Pets, Food-101 and ImageNet in their true files."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf
from real_formats import (
    class_of,
    photograph,
    write_flowers102,
    write_food101,
    write_imagenet,
    write_oxford_pet,
    write_stl10,
    write_svhn,
)

from cvtrain.data import STL10, SVHN, Flowers102, Food101, ImageNet, OxfordPet
from cvtrain.errors import DataError

SETS = {
    SVHN: (write_svhn, ["train_32x32.mat", "test_32x32.mat"]),
    STL10: (write_stl10, ["stl10_binary", "train_X.bin", "test_y.bin"]),
    Flowers102: (write_flowers102, ["flowers-102", "jpg/", "imagelabels.mat", "setid.mat"]),
    OxfordPet: (write_oxford_pet, ["oxford-iiit-pet", "images/", "annotations/trainval.txt"]),
    Food101: (write_food101, ["food-101", "images/", "meta/train.json"]),
    ImageNet: (write_imagenet, ["train/nXXXXXXXX/*.JPEG", "val/nXXXXXXXX/*.JPEG"]),
}


def images(source):
    return source.read(np.arange(len(source))).numpy()


def labels_fit(sets):
    for source in (sets.train, sets.val, sets.test):
        assert [class_of(picture) for picture in images(source)] == source.labels.tolist()


@pytest.mark.parametrize("target", SETS, ids=lambda target: target.__name__)
def test_an_absent_set_names_the_folder_the_files_and_the_fix(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        target().load(32, 1.0, 0)
    text = str(error.value)
    for part in [str(tmp_path / "data" / target.name), "data.root=DIR", *SETS[target][1]]:
        assert part in text
    assert ("data.download=true" in text) == (target is not ImageNet)
    assert text.count("\n") <= 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", [t for t in SETS if t is not ImageNet], ids=lambda target: target.__name__)
def test_a_download_asks_torchvision_for_every_split_and_is_read_where_it_puts_it(target, tmp_path, monkeypatch):
    asked = []

    def fake(root, download, **split):
        asked.append(split)
        folder = tmp_path / target.subfolders[0]
        if not any(folder.glob("*")):
            SETS[target][0](folder)

    import torchvision.datasets

    real = getattr(torchvision.datasets, target.torchvision_name)
    monkeypatch.setattr(torchvision.datasets, target.torchvision_name, fake)
    sets = target(root=str(tmp_path), download=True).load(32, 1.0, 0)
    assert len(sets.test) > 0
    for split in asked:
        with pytest.raises(RuntimeError):  # torchvision knows these names of splits, and finds no data
            real(str(tmp_path / "empty"), **split, download=False)


def test_svhn_reads_the_arrays_of_the_mat_files_and_its_tens_as_zeros(tmp_path):
    written = write_svhn(tmp_path)
    sets = SVHN(root=str(tmp_path)).load(None, 1.0, 0)
    assert sets.counts() == {"train": 50, "val": 10, "test": 20, "skipped": 0}
    np.testing.assert_array_equal(images(sets.test), written["test"].transpose(3, 2, 0, 1))
    assert sets.test.labels.tolist() == [i % 10 for i in range(20)]
    assert sets.class_names[0] == "0"
    assert any("official splits: 60 train, 20 test" in note for note in sets.notes)


@pytest.mark.parametrize("target", [SVHN, STL10])
def test_what_is_read_is_what_torchvision_reads(target, tmp_path, monkeypatch):
    import torchvision.datasets

    folder = tmp_path / target.subfolders[0]
    SETS[target][0](folder)
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    theirs = getattr(torchvision.datasets, target.torchvision_name)(str(tmp_path), split="test")
    ours = target(root=str(tmp_path)).load(None, 1.0, 0).test
    np.testing.assert_array_equal(images(ours).transpose(0, 2, 3, 1), np.stack([np.array(p) for p, _ in theirs]))
    assert ours.labels.tolist() == [int(label) for _, label in theirs]


@pytest.mark.parametrize("folder", ["", "stl10_binary"])
def test_stl10_reads_columns_as_rows(tmp_path, folder):
    written = write_stl10(tmp_path / folder)
    sets = STL10(root=str(tmp_path)).load(None, 1.0, 0)
    assert sets.counts() == {"train": 50, "val": 10, "test": 20, "skipped": 0}
    assert sets.preprocess.img_size == 96
    np.testing.assert_array_equal(images(sets.test), written["test"].transpose(0, 3, 1, 2))
    assert sets.test.labels.tolist() == [i % 10 for i in range(20)]


@pytest.mark.parametrize(
    "body", [b"", b"<html>404</html>", b"MATLAB 5.0 MAT-file" + bytes(500)], ids=["empty", "html", "header"]
)
def test_a_damaged_mat_file_is_refused_by_name(tmp_path, body):
    write_svhn(tmp_path)
    (tmp_path / "test_32x32.mat").write_bytes(body)
    with pytest.raises(DataError, match=r"test_32x32.mat: .*\n  it is damaged"):
        SVHN(root=str(tmp_path)).load(None, 1.0, 0)
    write_flowers102(tmp_path)
    (tmp_path / "setid.mat").write_bytes(body)
    with pytest.raises(DataError, match=r"setid.mat: .*\n  it is damaged"):
        Flowers102(root=str(tmp_path)).load(None, 1.0, 0)


def test_a_truncated_mat_file_and_a_truncated_binary_are_refused_by_name(tmp_path):
    write_svhn(tmp_path)
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"train_32x32.mat: "):
        SVHN(root=str(tmp_path)).load(None, 1.0, 0)
    write_stl10(tmp_path)
    path = tmp_path / "train_X.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train_X.bin: 1658879 bytes for 60 labels"):
        STL10(root=str(tmp_path)).load(None, 1.0, 0)


def test_svhn_pictures_and_labels_that_differ_in_number_are_refused(tmp_path):
    from scipy.io import savemat

    write_svhn(tmp_path)
    savemat(tmp_path / "test_32x32.mat", {"X": np.zeros((32, 32, 3, 5), np.uint8), "y": np.ones((4, 1), np.uint8)})
    with pytest.raises(DataError, match=r"shape \(32, 32, 3, 5\) for 4 labels"):
        SVHN(root=str(tmp_path)).load(None, 1.0, 0)


@pytest.mark.parametrize("folder", ["", "flowers-102"])
def test_flowers_have_their_three_official_splits_and_names(tmp_path, folder):
    write_flowers102(tmp_path / folder, 1, 2, 3)
    data = Flowers102(root=str(tmp_path))
    sets = data.load(16, 1.0, 2)
    assert sets.counts() == {"train": 102, "val": 204, "test": 306, "skipped": 0}
    labels_fit(sets)
    assert (sets.num_classes, len(set(sets.class_names))) == (102, 102)
    assert (sets.class_names[0], sets.class_names[101]) == ("pink primrose", "blackberry lily")
    assert any("official splits: 102 train, 204 val, 306 test" in note for note in sets.notes)


def test_the_names_of_the_flowers_are_torchvisions():
    from torchvision.datasets import Flowers102 as Theirs

    from cvtrain.data.photographs import FLOWERS

    assert " ".join(FLOWERS.split()).split(", ") == Theirs.classes


@pytest.mark.parametrize("folder", ["", "oxford-iiit-pet"])
def test_pets_take_breeds_from_the_lists_and_val_from_trainval(tmp_path, folder):
    write_oxford_pet(tmp_path / folder)
    sets = OxfordPet(root=str(tmp_path)).load(16, 1.0, 2)
    assert sets.counts() == {"train": 39, "val": 3, "test": 12, "skipped": 0}
    labels_fit(sets)
    assert sets.class_names == ["Abyssinian", "american bulldog", "Egyptian Mau"]
    assert any("official splits: 42 trainval, 12 test" in note for note in sets.notes)


def test_pets_of_other_formats_named_jpg_are_read_and_unreadable_ones_are_listed_or_skipped(tmp_path):
    write_oxford_pet(tmp_path)
    photograph(tmp_path / "images" / "Abyssinian_1.jpg", 0, format="PNG")
    photograph(tmp_path / "images" / "Abyssinian_2.jpg", 0, format="GIF")
    (tmp_path / "images" / "Abyssinian_3.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "images" / "Abyssinian_4.jpg").unlink()
    with pytest.raises(DataError, match="2 of 54 pictures cannot be read") as error:
        OxfordPet(root=str(tmp_path)).load(16, 1.0, 0)
    assert [line.split(": ")[0] for line in error.value.details] == [
        str(tmp_path / "images" / f"Abyssinian_{i}.jpg") for i in (3, 4)
    ]
    sets = OxfordPet(root=str(tmp_path), on_error="skip", max_bad=0.1).load(16, 1.0, 0)
    assert (sets.skipped, sum(sets.counts().values())) == (2, 54)
    labels_fit(sets)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Abyssinian_1\n", "line 1 is not 'NAME CLASS"),
        ("Abyssinian_1 1 1 1\nBengal_1 1 1 1\n", "line 2 gives Bengal the number of Abyssinian"),
        ("Abyssinian_1 1 1 1\nBengal_1 4 1 1\n", "with gaps"),
        ("\xff".encode("latin-1"), "test.txt|trainval.txt"),
    ],
)
def test_a_damaged_list_of_pets_is_refused_with_its_line(tmp_path, text, said):
    write_oxford_pet(tmp_path)
    for name in ("trainval.txt", "test.txt"):
        (tmp_path / "annotations" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=said):
        OxfordPet(root=str(tmp_path)).load(16, 1.0, 0)


@pytest.mark.parametrize("folder", ["", "food-101"])
def test_food_reads_its_lists(tmp_path, folder):
    write_food101(tmp_path / folder)
    sets = Food101(root=str(tmp_path)).load(16, 1.0, 2)
    assert sets.counts() == {"train": 39, "val": 3, "test": 12, "skipped": 0}
    labels_fit(sets)
    assert sets.class_names == ["apple pie", "baby back ribs", "zuppa"]


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 3}', '{"a": [3]}', "{"])
def test_a_damaged_list_of_food_is_refused(tmp_path, content):
    write_food101(tmp_path)
    (tmp_path / "meta" / "train.json").write_text(content)
    with pytest.raises(DataError, match=r"train.json"):
        Food101(root=str(tmp_path)).load(16, 1.0, 0)


def test_a_dish_of_the_test_that_train_lacks_is_refused(tmp_path):
    write_food101(tmp_path)
    path = tmp_path / "meta" / "test.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "soup": ["soup/1"]}))
    with pytest.raises(DataError, match=r"class 'soup' is not in train.json"):
        Food101(root=str(tmp_path)).load(16, 1.0, 0)


def test_imagenets_official_val_is_the_test_and_a_note_says_so(tmp_path):
    write_imagenet(tmp_path)
    (tmp_path / "train" / "lost+found").mkdir()
    sets = ImageNet(root=str(tmp_path)).load(16, 1.0, 2)
    assert sets.counts() == {"train": 39, "val": 3, "test": 12, "skipped": 0}
    labels_fit(sets)
    assert all(name.startswith("val/") for name in sets.test.names)
    assert all(name.startswith("train/") for name in [*sets.train.names, *sets.val.names])
    assert any("official validation pictures are the test" in note for note in sets.notes)
    assert sets.class_names == ["n01440764", "n02012849", "n03126707"]


def test_imagenets_readable_names_are_told_apart_where_two_classes_share_one(tmp_path):
    write_imagenet(tmp_path)
    (tmp_path / "LOC_synset_mapping.txt").write_text(
        "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\nn99999999 other\n"
    )
    sets = ImageNet(root=str(tmp_path)).load(16, 1.0, 2)
    assert sets.class_names == ["tench", "crane (n02012849)", "crane (n03126707)"]


def test_imagenet_pictures_that_lie_flat_or_in_an_unknown_class_are_refused(tmp_path):
    write_imagenet(tmp_path)
    photograph(tmp_path / "val" / "n99999999" / "x.JPEG", 0)
    with pytest.raises(DataError, match="class n99999999 is in val but not in train"):
        ImageNet(root=str(tmp_path)).load(16, 1.0, 0)
    flat = tmp_path / "flat"
    write_imagenet(flat)
    for path in list((flat / "val").glob("*/*")):
        path.rename(flat / "val" / path.name)
    with pytest.raises(DataError, match="no pictures in folders named by class"):
        ImageNet(root=str(flat)).load(16, 1.0, 0)


def test_house_numbers_are_never_mirrored():
    from pathlib import Path

    overrides = OmegaConf.load(Path(__file__).parents[2] / "configs" / "data" / "svhn.yaml").aug_overrides
    assert overrides.horizontal_flip is None
    assert overrides.vertical_flip is None
