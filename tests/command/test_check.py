"""`cvtrain check`, as a user runs it: what it finds, what it says, what it exits with."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import ugly
from PIL import Image
from real_formats import write_mnist

from cvtrain.data import printable

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning:PIL")]


def texture(seed, size=(80, 64)):
    """A picture of its own at every scale, like a photograph."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3), np.float32)
    for side in (3, 6, 12, 24):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32) / side**0.5
    return Image.fromarray((255 * (total - total.min()) / np.ptp(total)).astype(np.uint8))


@pytest.fixture
def photos(tmp_path):
    """train, val and test of two classes, all pictures distinct."""
    root = tmp_path / "photos"
    seed = 0
    for split, count in (("train", 8), ("val", 3), ("test", 3)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                texture(seed).save(root / split / name / f"{number}.png")
                seed += 1
    return root


def check(cvtrain, root, *more):
    return cvtrain("check", "data=folder", f"data.root={root}", "img_size=32", "json=true", *more)


def test_a_clean_folder_passes_and_is_described(photos, cvtrain):
    before = ugly.tree_hash(photos)
    answer = check(cvtrain, photos)
    assert answer.code == 0, answer.err
    found = answer.json
    assert found == json.loads((answer.folder / "check.json").read_text())
    assert (answer.folder / "check.html").read_text().startswith("<!doctype html>")
    assert found["duplicates"] == [] and found["unreadable"] == [] and not found["failed"]
    assert found["classes"]["cat"] == {"train": 8, "val": 3, "test": 3}
    assert found["sizes"]["width"]["median"] == 80
    assert found["sizes"]["aspect"]["max"] == 1.25
    assert len(found["channels"]) == 3
    assert ugly.tree_hash(photos) == before


def members(group):
    return {(picture["split"], picture["name"]) for picture in group["pictures"]}


def test_planted_leaks_of_every_kind_are_named_and_exit_3(photos, cvtrain):
    picture = Image.open(photos / "train" / "cat" / "0.png")
    shutil.copy(photos / "train" / "cat" / "1.png", photos / "test" / "cat" / "same.png")
    Image.open(photos / "train" / "cat" / "2.png").save(photos / "val" / "cat" / "container.bmp")
    picture.save(photos / "test" / "cat" / "jpeg.jpg", quality=40)
    Image.open(photos / "train" / "dog" / "3.png").resize((160, 128)).save(photos / "val" / "dog" / "larger.png")
    Image.open(photos / "train" / "dog" / "4.png").crop((3, 1, 79, 61)).save(photos / "test" / "dog" / "cropped.png")
    answer = check(cvtrain, photos)
    assert answer.code == 3
    found = answer.json
    expected = {
        "bytes": {("train", "train/cat/1.png"), ("test", "test/cat/same.png")},
        "pixels": {("train", "train/cat/2.png"), ("val", "val/cat/container.bmp")},
    }
    kinds = {
        kind: [members(g) for g in found["duplicates"] if g["kind"] == kind] for kind in ("bytes", "pixels", "near")
    }
    assert kinds["bytes"] == [expected["bytes"]]
    assert kinds["pixels"] == [expected["pixels"]]
    assert sorted(map(sorted, kinds["near"])) == sorted(
        sorted(pair)
        for pair in (
            {("train", "train/cat/0.png"), ("test", "test/cat/jpeg.jpg")},
            {("train", "train/dog/3.png"), ("val", "val/dog/larger.png")},
            {("train", "train/dog/4.png"), ("test", "test/dog/cropped.png")},
        )
    )
    assert found["leaks"] == 5
    assert found["label_conflicts"] == 0
    assert "leaks 5" in answer.err
    assert "test/cat/same.png" in answer.err


def test_copies_within_train_are_warnings_and_two_labels_are_named(photos, cvtrain):
    shutil.copy(photos / "train" / "cat" / "0.png", photos / "train" / "dog" / "copy.png")
    Image.open(photos / "train" / "cat" / "1.png").save(photos / "train" / "cat" / "again.jpg", quality=80)
    answer = check(cvtrain, photos)
    assert answer.code == 0, answer.err
    conflict, copy = answer.json["duplicates"]
    assert conflict["label_conflict"] and not conflict["leak"]
    assert {picture["label"] for picture in conflict["pictures"]} == {"cat", "dog"}
    assert copy["kind"] == "near" and not copy["label_conflict"]
    assert "two labels" in answer.err


def test_near_null_leaves_the_near_search_out(photos, cvtrain):
    Image.open(photos / "train" / "cat" / "0.png").save(photos / "val" / "cat" / "again.jpg", quality=80)
    assert check(cvtrain, photos).code == 3
    answer = check(cvtrain, photos, "near=null")
    assert answer.code == 0
    assert answer.json["duplicates"] == []


def test_photographs_of_which_only_the_metadata_differs_have_the_same_pixels(photos, cvtrain):
    large = texture(99, (400, 300))
    large.save(photos / "train" / "cat" / "large.jpg", quality=90)
    data = (photos / "train" / "cat" / "large.jpg").read_bytes()
    (photos / "test" / "cat" / "edited.jpg").write_bytes(data[:2] + b"\xff\xfe\x00\x07hello" + data[2:])
    large.save(photos / "test" / "dog" / "other.jpg", quality=89)
    groups = check(cvtrain, photos).json["duplicates"]
    kinds = {(group["kind"], len(group["pictures"])) for group in groups}
    assert kinds == {("pixels", 2), ("near", 2)}


def test_every_unreadable_file_is_listed_and_the_folder_left_as_it_was(tmp_path, cvtrain):
    root = tmp_path / "messy"
    bad = set()
    for seed, name in enumerate(("aye", "bee")):
        for file in ugly.write(root / name):
            if file.verdict == "bad":
                bad.add(printable(str(root / name / file.name)))
        for number in range(6):
            texture(100 * seed + number).save(root / name / f"good{number}.png")
    before = ugly.tree_hash(root)
    answer = check(cvtrain, root)
    assert answer.code == 3
    found = answer.json
    assert {line.rpartition(": ")[0] for line in found["unreadable"]} == bad
    assert found["counts"]["skipped"] == len(bad) == 42
    assert "unreadable 42" in answer.err
    assert ugly.tree_hash(root) == before
    page = (answer.folder / "check.html").read_text()
    assert all(Path(path).name.replace("&", "&amp;") in page for path in bad)


def test_a_folder_of_nothing_readable_names_the_files(tmp_path, cvtrain):
    for name in ("a", "b"):
        (tmp_path / "p" / name).mkdir(parents=True)
        (tmp_path / "p" / name / "x.png").write_bytes(b"")
    answer = check(cvtrain, tmp_path / "p")
    assert answer.code == 3
    assert answer.err.count("empty file") == 2


def test_arrays_are_checked_too_and_without_json_the_last_line_is_the_page(tmp_path, cvtrain):
    arrays = write_mnist(tmp_path / "m", train=60, test=20, packed=False)
    assert arrays
    answer = cvtrain("check", "data=mnist", f"data.root={tmp_path / 'm'}")
    assert answer.code == 0, answer.err
    assert Path(answer.last).name == "check.html"
    assert "Channels of train" in answer.out


def test_a_wrong_key_group_or_value_is_told_by_name(cvtrain):
    for argv, text in (
        (["dat=folder"], "did you mean"),
        (["model=lenet5"], "model"),
        (["near=0.5"], "near=0.5 is not allowed"),
        (["data=foler"], "did you mean 'folder'"),
        (["aug.eval_resize=0"], "eval_resize"),
    ):
        answer = cvtrain("check", *argv)
        assert answer.code == 2, (argv, answer.err)
        assert text in answer.err


def test_the_augmented_batch_is_on_the_page(photos, cvtrain):
    answer = check(cvtrain, photos, "aug=strong")
    page = (answer.folder / "check.html").read_text()
    assert page.count("augmented</figcaption>") == 16
    assert page.count("as read</figcaption>") == 16


def test_help_lists_keys_and_groups(cvtrain):
    answer = cvtrain("check", "--help")
    assert answer.code == 0
    assert "near=8.0" in answer.out
    assert "data=digits" in answer.out
    assert "  check " in cvtrain("--help").out
