"""What holds for every data set alike: limits, folds, caches, unreadable pictures, a folder that stays as it was."""

import hashlib
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import get_class
from real_formats import write_for

from cvtrain import catalog
from cvtrain.compose import Composer
from cvtrain.data import HuggingFace
from cvtrain.data.base import DataSet, EncodedDataSet
from cvtrain.data.source import ArraySource
from cvtrain.errors import ConfigError, DataError

OPTIONS = catalog.groups()["data"]


@pytest.fixture(params=OPTIONS)
def data(request, tmp_path, monkeypatch):
    """Make the data set that `data=OPTION` and some overrides of its keys mean."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    overrides = [f"data={request.param}", *write_for(request.param, tmp_path / "data")]
    config = Composer("train", None).check(overrides, [])[1]["data"]
    target = get_class(config["_target_"])
    given = {key: value for key, value in config.items() if key in inspect.signature(target).parameters}

    def make(**changes) -> DataSet:
        return target(**{**given, **changes})

    make.folder = tmp_path / "data"
    return make


def names(sets):
    return {split: list(getattr(sets, split).names) for split in ("train", "val", "test")}


def digest(folder):
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        whole.update(f"{path}{path.lstat().st_mtime_ns}".encode() + (path.read_bytes() if path.is_file() else b""))
    return whole.hexdigest()


def test_splits_are_disjoint_repeatable_and_nothing_is_written_beside_the_data(data):
    before = digest(data.folder)
    sets = data().load(16, 1.0, 2)
    found = names(sets)
    everything = [name for split in found.values() for name in split]
    assert len(set(everything)) == len(everything)
    assert min(sets.counts()[split] for split in ("train", "val", "test")) > 0
    assert names(data().load(16, 1.0, 0)) == found
    assert tuple(sets.train.read(np.array([0, 1])).shape[2:]) == (16, 16)
    assert digest(data.folder) == before


def test_a_limit_keeps_every_class_and_leaves_val_and_test_whole(data):
    whole = data().load(16, 1.0, 2)
    limit = whole.num_classes + (len(whole.train) - whole.num_classes) // 2
    sets = data(limit=limit).load(16, 1.0, 2)
    assert len(sets.train) == limit
    assert set(sets.train.labels.tolist()) == set(whole.train.labels.tolist())
    assert set(sets.train.names) <= set(whole.train.names)
    assert (names(sets)["val"], names(sets)["test"]) == (names(whole)["val"], names(whole)["test"])


def test_folds_test_each_picture_outside_an_official_test_once(data):
    whole = data().load(16, 1.0, 2)
    tested = []
    # Flowers102 has too few pictures of a flower here for a fold without it to have the others.
    loose = {"allow_empty": True} if isinstance(data(), EncodedDataSet) else {}
    for fold in range(3):
        sets = data(folds=3, fold=fold, **loose).load(16, 1.0, 2)
        found = names(sets)
        assert not set(found["test"]) & set(found["train"] + found["val"])
        tested += found["test"]
    assert len(set(tested)) == len(tested)
    carved = any("carved" in note and "for test" in note for note in whole.notes)
    expected = whole.train.names + whole.val.names + (whole.test.names if carved else [])
    assert sorted(tested) == sorted(expected)


def test_pictures_are_equal_whether_they_are_kept_in_memory_on_disk_or_not_at_all(data):
    if not isinstance(data(), EncodedDataSet):
        pytest.skip("arrays are in memory")
    read = {}
    for cache in ("none", "memory", "disk", "auto"):
        sets = data(cache=cache).load(16, 1.0, 2)
        assert isinstance(sets.train, ArraySource) == (cache != "none")
        read[cache] = [source.read(np.arange(len(source))) for source in (sets.train, sets.val, sets.test)]
    for cache in ("memory", "disk", "auto"):
        assert all(torch.equal(one, two) for one, two in zip(read["none"], read[cache], strict=True))


def test_an_unreadable_picture_stops_with_its_place_or_is_left_out_without_moving_another(data):
    if not isinstance(data(), EncodedDataSet):
        pytest.skip("arrays have no unreadable pictures")
    # Flowers102 has one training picture of a flower here.
    made = {"max_bad": 0.1, "allow_empty": True}
    whole = names(data(cache="none").load(16, 1.0, 2))
    part = data().read().parts["train"]
    victim = whole["train"][0]
    content = part.pictures.content(part.names.index(victim))
    raw = content if isinstance(content, bytes) else Path(content).read_bytes()
    hit = 0
    for path in data.folder.rglob("*"):
        if path.is_file() and (before := path.read_bytes()).count(raw):
            hit += before.count(raw)
            path.write_bytes(before.replace(raw, bytes(len(raw))))
    assert hit == 1
    for cache in ("none", "memory", "disk"):
        with pytest.raises(DataError, match=r"1 of \d+ pictures cannot be read") as error:
            data(cache=cache, **made).load(16, 1.0, 2)
        assert len(error.value.details) == 1
        sets = data(cache=cache, on_error="skip", **made).load(16, 1.0, 2)
        assert sets.skipped == 1
        assert names(sets) == {**whole, "train": [name for name in whole["train"] if name != victim]}


def test_data_hf_without_its_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'cvtrain\[hf\]'"):
        HuggingFace(name="some/set").load(8, 1.0, 0)
