"""Folders as people have them: each file is read right, or listed by name, or left out and counted (R10)."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import ugly
from PIL import Image
from real_formats import idx, write_mnist

from cvtrain.data import Folder, printable, read_picture
from cvtrain.data.picture import check_picture
from cvtrain.errors import DataError

SIDE = 8
QUICK = ("data=folder", "img_size=16", "model=lenet5", "epochs=1", "batch_size=16", "compression=none", "export=none",
         "logger=none", "plots=false", "report=false", "device=cpu", "threads=1", "workers=2", "json=true")  # fmt: skip

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Pillow warns of sizes and EXIF; the loader silences it, a bare read does not.
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """Two classes of 20 good pictures, all ugly files in each; returns root and verdicts by relative path."""
    root = tmp_path_factory.mktemp("messy") / "pictures"
    verdicts = {}
    for name in ("aye", "bee"):
        for file in ugly.write(root / name):
            verdicts[f"{name}/{file.name}"] = file
        for number in range(20):
            ugly.quadrants().save(root / name / f"good{number:02}.png")
            verdicts[f"{name}/good{number:02}.png"] = ugly.Ugly(f"good{number:02}.png", "", "read")
    return root, verdicts


def of(verdicts, verdict):
    return {printable(path): file for path, file in verdicts.items() if file.verdict == verdict}


def corners(pixels):
    """The colours in the middle of the four quadrants of `(C, 8, 8)`."""
    return [pixels[:, y, x].tolist() for y, x in ((1, 1), (1, 6), (6, 1), (6, 6))]


def assert_colours(pixels, file):
    difference = np.abs(np.subtract(corners(pixels), file.quadrants)).max()
    assert difference <= file.tolerance, f"{file.name}: {corners(pixels)}"


def load(root, **changes):
    return Folder(**{"root": str(root), **changes}).load(SIDE, 1.0, 2)


def test_the_ugly_folder_covers_every_row_of_the_contract(messy):
    _, verdicts = messy
    rows = {file.row for file in verdicts.values()} - {""}
    assert rows == {"I1", "I3", "I4", "I5", "I6", "I7", "I8", "I9", "I10", "I11"}
    counts = {verdict: len(of(verdicts, verdict)) for verdict in ("read", "bad", "ignored")}
    assert counts == {"read": 2 * (46 + 20), "bad": 2 * 21, "ignored": 2 * 8}


def test_each_ugly_file_is_read_to_the_right_pixels_or_refused_for_the_right_reason(messy):
    root, verdicts = messy
    for path, file in verdicts.items():
        if file.verdict == "read":
            several = []
            assert_colours(read_picture(str(root / path), SIDE, 3, on_frames=several.append), file)
            assert bool(several) == file.frames, path
            check_picture(str(root / path))
        if file.verdict == "bad":
            for read in (lambda path: read_picture(path, SIDE, 3), check_picture):
                with pytest.raises(DataError) as error:
                    read(str(root / path))
                assert str(error.value).startswith(f"{printable(str(root / path))}: "), path
                assert file.reason in str(error.value)
                assert "\n" not in str(error.value)


def test_a_later_frame_that_is_damaged_does_not_cost_the_picture(tmp_path):
    frames = [ugly.quadrants(), ugly.noise(32)]
    for end in ("gif", "tif"):
        path = tmp_path / f"x.{end}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        whole = path.read_bytes()
        path.write_bytes(whole[:-700])
        assert_colours(read_picture(str(path), SIDE, 3, on_frames=lambda _: None), ugly.Ugly("", "", "read"))


def test_fail_names_every_bad_file_at_once_before_training_in_a_process_that_ends(messy, tmp_path):
    root, verdicts = messy
    before = ugly.tree_hash(root)
    answer = subprocess.run(
        [sys.executable, "-m", "cvtrain", *QUICK, f"data.root={root}", f"output_dir={tmp_path}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert answer.returncode == 3, answer.stderr
    message = next(line for line in answer.stderr.splitlines() if "cannot be read" in line)
    assert "42 of 174 pictures cannot be read" in message
    for path in of(verdicts, "bad"):
        assert f"{path}: " in message
    for path in [*of(verdicts, "read"), *of(verdicts, "ignored")]:
        assert f"{path}: " not in message
    assert "data.on_error=skip" in answer.stderr
    run = json.loads(answer.stdout.splitlines()[-1])
    assert run["exit_code"] == 3
    assert not (Path(run["run"]) / "results.csv").exists()
    assert ugly.tree_hash(root) == before


def test_above_fifty_bad_files_the_message_names_fifty_and_a_file_of_the_run_all(tmp_path, cvtrain):
    for name in ("a", "b"):
        (tmp_path / "p" / name).mkdir(parents=True)
        ugly.quadrants().save(tmp_path / "p" / name / "good.png")
        for number in range(40):
            (tmp_path / "p" / name / f"bad{number:02}.png").write_bytes(b"")
    answer = cvtrain(*QUICK, f"data.root={tmp_path / 'p'}")
    assert answer.code == 3
    assert answer.err.count("empty file") == 50
    assert "80 of 82" in answer.err
    assert "unreadable.txt" in answer.err
    lines = (answer.folder / "unreadable.txt").read_text().splitlines()
    assert len(lines) == 80
    assert all(line.endswith("empty file") for line in lines)


@pytest.mark.parametrize("cache_mb", [2048, 0])
def test_skip_keeps_every_label_and_picture_with_its_file(messy, cache_mb):
    root, verdicts = messy
    sets = load(root, on_error="skip", max_bad=1.0, cache_mb=cache_mb)
    expected, seen = of(verdicts, "read"), []
    for source in (sets.train, sets.val, sets.test):
        pixels = source.read(np.arange(len(source)))
        for name, label, picture in zip(source.names, source.labels.tolist(), pixels, strict=True):
            assert sets.class_names[label] == name.split("/")[0]
            assert_colours(picture, expected[name])
            seen.append(name)
    assert sorted(seen) == sorted(expected)
    assert sets.counts()["skipped"] == 42
    assert {line.rpartition(": ")[0].removeprefix(f"{root}/") for line in sets.bad if "symbolic" not in line} <= set(
        of(verdicts, "bad")
    )
    assert len(sets.bad) == 42


def test_one_notice_says_how_many_pictures_have_several_frames(messy):
    root, verdicts = messy
    for cache_mb in (2048, 0):
        notes = load(root, on_error="skip", max_bad=1.0, cache_mb=cache_mb).notes
        said = [note for note in notes if "first frame" in note]
        assert len(said) == 1
        assert said[0].startswith(f"{sum(file.frames for file in verdicts.values())} picture")


def test_skip_trains_and_counts_in_the_json_line_and_leaves_the_folder_as_it_was(messy, cvtrain):
    root, verdicts = messy
    before = ugly.tree_hash(root)
    answer = cvtrain(*QUICK, f"data.root={root}", "data.on_error=skip", "data.max_bad=0.5")
    assert answer.code == 0, answer.err
    data = answer.json["data"]
    assert data["skipped"] == 42
    assert data["train"] + data["val"] + data["test"] == len(of(verdicts, "read"))
    rows = (answer.folder / "predictions.csv").read_text().splitlines()[1:]
    assert len(rows) == data["test"]
    assert all(f",{row.strip(chr(34))[:3]}," in row for row in rows)
    splits = json.loads((answer.folder / "splits.json").read_text())
    assert sorted(name for names in splits.values() for name in names) == sorted(of(verdicts, "read"))
    assert ugly.tree_hash(root) == before


def test_skip_refuses_to_go_on_when_more_than_the_agreed_share_is_bad(messy, cvtrain):
    root, _ = messy
    answer = cvtrain(*QUICK, f"data.root={root}", "data.on_error=skip")
    assert answer.code == 3
    assert "42 of 174 pictures cannot be read, more than data.max_bad=0.01" in answer.err


def test_600_files_with_a_flipped_bit_are_read_or_refused_in_a_process_that_lives(tmp_path):
    seed, count = 20261122, 600
    answer = subprocess.run(
        [sys.executable, ugly.__file__, str(tmp_path), str(seed), str(count)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, f"seed {seed}: {answer.stderr[-2000:]}"
    told = json.loads(answer.stdout.splitlines()[-1])
    assert sum(sum(outcome.values()) for outcome in told["formats"].values()) == count
    assert all(told["formats"][kind]["refused"] for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"))
    assert told["grown_mb"] < 600
    assert told["slowest"] < 10


def pictures(root, counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (SIDE, SIDE), (number, 0, 0)).save(root / name / f"{number:03}.png")
    return root


def test_an_empty_class_is_named_and_may_be_allowed(tmp_path, cvtrain):
    root = pictures(tmp_path / "p", {"a": 20, "b": 20, "nothing": 0})
    answer = cvtrain(*QUICK, f"data.root={root}")
    assert answer.code == 3
    assert "'nothing' holds no picture" in answer.err
    allowed = load(root, allow_empty=True)
    assert allowed.class_names == ["a", "b", "nothing"]
    assert [note for note in allowed.notes if "nothing" in note]
    answer = cvtrain(*QUICK, f"data.root={root}", "data.allow_empty=true")
    assert answer.code == 0, answer.err


def test_one_class_is_refused_also_where_empty_ones_are_allowed(tmp_path, cvtrain):
    root = pictures(tmp_path / "p", {"only": 20})
    answer = cvtrain(*QUICK, f"data.root={root}", "data.allow_empty=true")
    assert answer.code == 3
    assert "one class" in answer.err


def test_a_class_that_only_val_has_stops_and_one_that_val_lacks_is_noted(tmp_path, cvtrain):
    pictures(tmp_path / "p" / "train", {"a": 20, "b": 20})
    pictures(tmp_path / "p" / "val", {"b": 4})
    pictures(tmp_path / "p" / "test", {"a": 4, "b": 4})
    assert "val has no picture of 1 class(es): a" in load(tmp_path / "p").notes
    pictures(tmp_path / "p" / "val", {"zebra": 1})
    answer = cvtrain(*QUICK, f"data.root={tmp_path / 'p'}")
    assert answer.code == 3
    assert "'zebra' is in val but not in train" in answer.err


def test_a_label_out_of_range_is_found_before_training(tmp_path, cvtrain):
    root = tmp_path / "m"
    written = write_mnist(root, packed=False)
    labels = written["train-labels-idx1-ubyte"].copy()
    labels[7] = 156  # -100 as a byte
    (root / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    answer = cvtrain(*(word for word in QUICK if word != "data=folder"), "data=mnist", f"data.root={root}")
    assert answer.code == 3
    assert "156" in answer.err


def test_fewer_pictures_than_a_batch_train_and_too_few_to_split_stop(tmp_path, cvtrain):
    root = pictures(tmp_path / "p", {"a": 6, "b": 6})
    answer = cvtrain(*QUICK, f"data.root={root}", "batch_size=64")
    assert answer.code == 0, answer.err
    root = pictures(tmp_path / "few", {"a": 2, "b": 1})
    answer = cvtrain(*QUICK, f"data.root={root}", "batch_size=64")
    assert answer.code == 3
    assert "the test split is empty" in answer.err


def test_the_printed_names_of_the_messy_folder_are_one_line_of_plain_text_each(messy):
    _, verdicts = messy
    names = [printable(path) for path in verdicts]
    assert len(set(names)) == len(verdicts)
    assert all(name.isprintable() and name.encode() for name in names)


def test_a_file_that_may_not_be_opened_is_listed(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may open everything")
    root = pictures(tmp_path / "p", {"a": 5, "b": 5})
    (root / "a" / "000.png").chmod(0)
    with pytest.raises(DataError, match=r"000\.png: Permission denied"):
        load(root)


def test_no_warning_of_pillow_reaches_the_user(messy):
    root, _ = messy
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(root, on_error="skip", max_bad=1.0)
    assert not [w for w in caught if "PIL" in w.filename]
