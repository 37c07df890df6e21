"""The cache of decoded pictures: equal pixels, and safe against other runs, kills, changes and full disks."""

import errno
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from real_formats import write_folder

from cvtrain.data import Folder, Loader, LoaderConfig
from cvtrain.data.cache import Cache
from cvtrain.errors import StorageError

FORK = multiprocessing.get_context("fork")


def load(root, cache_dir, size=16, **changes):
    return Folder(root=str(root), cache="disk", cache_dir=str(cache_dir), **changes).load(size, 1.0, 2)


def files(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


@pytest.fixture
def pictures(tmp_path):
    return write_folder(tmp_path / "pictures")


def all_pixels(sets):
    return {name: sets_pixels(source) for name, source in (("train", sets.train), ("val", sets.val))}


def sets_pixels(source):
    return source.read(np.arange(len(source)))


def test_cached_pictures_equal_decoded_ones_and_are_decoded_once(pictures, tmp_path, monkeypatch):
    plain = Folder(root=str(pictures), cache="memory").load(16, 1.0, 2)
    first = load(pictures, tmp_path / "cache")
    assert any("decoded once into the cache" in note for note in first.notes)
    monkeypatch.setattr("cvtrain.data.base.read_picture", lambda *args: pytest.fail("decoded again"))
    again = load(pictures, tmp_path / "cache")
    assert any("read from the cache" in note for note in again.notes)
    for sets in (first, again):
        for split, pixels in all_pixels(plain).items():
            assert torch.equal(all_pixels(sets)[split], pixels)
        assert sets.train.names == plain.train.names
        assert sets.train.labels.tolist() == plain.train.labels.tolist()


def test_other_splits_folds_and_seeds_share_one_file_and_other_sizes_do_not(pictures, tmp_path):
    cache = tmp_path / "cache"
    load(pictures, cache)
    load(pictures, cache, split_seed=5)
    load(pictures, cache, folds=3, fold=1)
    assert len([name for name in files(cache) if name.endswith(".npy")]) == 1
    load(pictures, cache, size=20)
    assert len([name for name in files(cache) if name.endswith(".npy")]) == 2


def test_a_changed_picture_is_decoded_anew(pictures, tmp_path):
    before = load(pictures, tmp_path / "cache")
    path = pictures / "red" / "3.png"
    path.write_bytes((pictures / "blue" / "0.png").read_bytes())
    os.utime(path, ns=(1, 1))
    after = load(pictures, tmp_path / "cache")
    split = next(s for s in ("train", "val", "test") if "red/3.png" in getattr(after, s).names)
    source, old = getattr(after, split), getattr(before, split)
    where = np.array([source.names.index("red/3.png")])
    assert not torch.equal(source.read(where), old.read(where))


def test_unreadable_pictures_are_remembered_with_their_reasons(pictures, tmp_path):
    (pictures / "red" / "3.png").write_bytes(b"no picture")
    for _ in range(2):
        sets = load(pictures, tmp_path / "cache", on_error="skip", max_bad=0.5)
        assert sets.skipped == 1
        assert "red/3.png" in sets.bad[0]
        assert "red/3.png" not in [*sets.train.names, *sets.val.names, *sets.test.names]


def test_writing_to_a_batch_never_changes_the_file(pictures, tmp_path):
    sets = load(pictures, tmp_path / "cache")
    before = sets_pixels(sets.train)
    batch = next(Loader(sets, LoaderConfig(4, 0, torch.device("cpu"))).train_batches(0))
    batch.images.zero_()
    assert torch.equal(sets_pixels(load(pictures, tmp_path / "cache").train), before)


def slowly(shape, seconds, started=None):
    def fill(into):
        from cvtrain.data.cache import Verdicts

        for row in range(shape[0]):
            into[row] = row
            if row == 1 and started is not None:
                started.set()
            time.sleep(seconds / shape[0])
        return Verdicts()

    return fill


SHAPE = (20, 4, 4, 3)


def build(folder, seconds, started, done):
    Cache(folder).pixels("k", SHAPE, slowly(SHAPE, seconds, started))
    done.set()


def test_a_kill_9_while_the_file_is_written_leaves_nothing_that_is_taken_for_it(tmp_path):
    started, done = FORK.Event(), FORK.Event()
    process = FORK.Process(target=build, args=(str(tmp_path), 30, started, done))
    process.start()
    assert started.wait(20)
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    assert not done.is_set()
    assert [name for name in files(tmp_path) if ".tmp-" in name], "the torn file is there, under another name"
    pixels, _, note = Cache(str(tmp_path)).pixels("k", SHAPE, slowly(SHAPE, 0))
    assert "decoded once" in note
    assert pixels[:, 0, 0, 0].tolist() == list(range(20))
    assert files(tmp_path) == ["k.json", "k.npy"]


def test_of_two_runs_at_once_one_writes_and_the_other_waits(tmp_path):
    started, done = FORK.Event(), FORK.Event()
    process = FORK.Process(target=build, args=(str(tmp_path), 1.0, started, done))
    process.start()
    assert started.wait(20)
    fill = slowly(SHAPE, 0)
    pixels, _, note = Cache(str(tmp_path)).pixels("k", SHAPE, lambda into: pytest.fail("written twice") or fill(into))
    process.join(20)
    assert done.is_set()
    assert "read from the cache" in note
    assert pixels[:, 0, 0, 0].tolist() == list(range(20))


def fill_up(folder, answers):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        Cache(folder).pixels("k", (100, 64, 64, 3), lambda into: pytest.fail("no room was made"))
    except StorageError as error:
        answers.put(str(error))


def test_a_full_disk_is_told_before_anything_is_decoded_and_leaves_nothing(tmp_path):
    answers = FORK.Queue()
    process = FORK.Process(target=fill_up, args=(str(tmp_path), answers))
    process.start()
    message = answers.get(timeout=20)
    process.join(20)
    assert "disk full" in message
    assert "data.cache_dir=DIR" in message
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_made_names_the_fix(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"data\.cache_dir=DIR"):
        Cache(str(tmp_path / "file" / "below")).pixels("k", SHAPE, slowly(SHAPE, 0))


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "json"])
def test_a_damaged_file_is_made_anew(damage, tmp_path):
    cache = Cache(str(tmp_path))
    cache.pixels("k", SHAPE, slowly(SHAPE, 0))
    path = tmp_path / "k.npy"
    if damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other":
        np.save(path, np.zeros((3, 3)))
    else:
        (tmp_path / "k.json").write_text("{")
    pixels, _, note = cache.pixels("k", SHAPE, slowly(SHAPE, 0))
    assert "decoded once" in note
    assert pixels[:, 0, 0, 0].tolist() == list(range(20))


def test_pictures_decoded_at_each_reading_are_checked_once_for_all_runs(pictures, tmp_path, monkeypatch):
    def run():
        return Folder(root=str(pictures), cache="none", cache_dir=str(tmp_path / "c")).load(16, 1.0, 2)

    assert any("to see that it is readable" in note for note in run().notes)
    monkeypatch.setattr("cvtrain.data.base.check_picture", lambda *args: pytest.fail("checked again"))
    assert any("by an earlier run" in note for note in run().notes)


def test_a_truncated_jpeg_is_named_before_training_also_when_pictures_are_not_held(pictures, tmp_path):
    from cvtrain.errors import DataError

    Image.effect_noise((300, 300), 80).convert("RGB").save(pictures / "red" / "x.jpg")
    whole = (pictures / "red" / "x.jpg").read_bytes()
    Path(pictures / "red" / "x.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"red/x\.jpg"):
        Folder(root=str(pictures), cache="none", cache_dir=str(tmp_path / "c")).load(16, 1.0, 2)


def test_folders_of_the_same_relative_path_do_not_share_a_cache(tmp_path, monkeypatch):
    """Files of one name, size and time, as a copy leaves them, but of other pixels."""
    found = []
    for number, name in enumerate(("one", "two")):
        write_folder(tmp_path / name / "d")
        for path in (tmp_path / name / "d").rglob("*.png"):
            pixels = np.full((8, 8, 3), 10 + 100 * number, np.uint8)
            Image.fromarray(pixels).save(path.with_suffix(".bmp"))
            os.utime(path.with_suffix(".bmp"), ns=(1, 1))
            path.unlink()
        monkeypatch.chdir(tmp_path / name)
        found.append(sets_pixels(load("d", tmp_path / "cache").train).unique().tolist())
    assert found == [[10], [110]]


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_a_failure_that_may_pass_is_not_remembered(cache, pictures, tmp_path, monkeypatch):
    def load_it():
        return Folder(
            root=str(pictures), cache=cache, cache_dir=str(tmp_path / "c"), on_error="skip", max_bad=1.0
        ).load(16, 1.0, 2)

    real = os.stat

    def stale(path, *args, **kwargs):
        if str(path).endswith("red/3.png") and sys._getframe(1).f_code.co_name == "_opened":
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", stale)
        first = load_it()
    assert (first.skipped, "Stale" in first.bad[0]) == (1, True)
    assert load_it().skipped == 0


def test_a_complete_cache_is_used_from_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    Cache(str(tmp_path)).pixels("k", SHAPE, slowly(SHAPE, 0))
    monkeypatch.setattr("fcntl.flock", lambda *args: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert "read from the cache" in Cache(str(tmp_path)).pixels("k", SHAPE, slowly(SHAPE, 0))[2]
    with pytest.raises(StorageError, match=r"cannot write the cache .*Permission denied"):
        Cache(str(tmp_path)).pixels("other", SHAPE, slowly(SHAPE, 0))
