"""data=hf: tables of Hugging Face's datasets library, of the real package."""

import hashlib
import socket
import time

import numpy as np
import pytest
import torch
from real_formats import class_of, encoded, photograph, write_hf

from cvtrain.data import HuggingFace, Loader, LoaderConfig
from cvtrain.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets")
NAMES = ["blue", "green", "red"]
PICTURES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    """A connection is a failure of the test, and the user's cache is another one."""
    asked = []
    connect = socket.socket.connect

    def refuse(*args):
        # Worker processes talk through sockets too, which are files.
        if isinstance(args[0], socket.socket) and args[0].family == socket.AF_UNIX:
            return connect(*args)
        asked.append(args)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return asked


def rows(count, **columns):
    made = {"image": [{"bytes": encoded(i % 3, i), "path": None} for i in range(count)]}
    return {**made, "label": [i % 3 for i in range(count)], **columns}


def saved(folder, features=None, **splits):
    tables = {
        name.replace("_", ""): datasets.Dataset.from_dict(content, datasets.Features(features or PICTURES))
        for name, content in splits.items()
    }
    datasets.DatasetDict(tables).save_to_disk(folder)
    return folder


def load(name, **changes):
    return HuggingFace(**{"name": str(name), "cache": "none", **changes}).load(8, 1.0, 2)


def labels_fit(sets):
    for source in (sets.train, sets.val, sets.test):
        read = [class_of(picture) for picture in source.read(np.arange(len(source))).numpy()]
        assert read == source.labels.tolist()


def test_a_saved_table_is_carved_and_its_folder_stays_as_it_was(tmp_path, no_network):
    folder = write_hf(tmp_path / "d")

    def digest():
        return [(path, path.stat().st_mtime_ns, hashlib.md5(path.read_bytes()).digest()) for path in folder.iterdir()]

    before = digest()
    sets = load(folder)
    assert sets.counts() == {"train": 30, "val": 3, "test": 9, "skipped": 0}
    assert sets.class_names == NAMES
    labels_fit(sets)
    assert (digest(), no_network) == (before, [])


@pytest.mark.parametrize("val", ["validation", "valid", "val"])
def test_splits_are_mapped_and_others_left_out(tmp_path, val):
    folder = saved(tmp_path / "d", train=rows(30), test=rows(9), unsupervised=rows(3), **{val: rows(6)})
    sets = load(folder)
    assert sets.counts() == {"train": 30, "val": 6, "test": 9, "skipped": 0}
    labels_fit(sets)
    assert any("'unsupervised' is left out" in note for note in sets.notes)


def test_a_test_split_without_labels_is_left_out_and_noted(tmp_path):
    hidden = {**rows(9), "label": [-1] * 9}
    sets = load(saved(tmp_path / "d", train=rows(30), test=hidden))
    assert sets.counts() == {"train": 21, "val": 3, "test": 6, "skipped": 0}
    assert any("the test split has no labels" in note for note in sets.notes)


def test_rows_that_were_selected_and_shuffled_before_saving_keep_their_labels(tmp_path):
    table = datasets.Dataset.from_dict(rows(60), datasets.Features(PICTURES))
    table.shuffle(seed=1).select(range(45)).save_to_disk(tmp_path / "d")
    sets = load(tmp_path / "d")
    assert sum(sets.counts().values()) == 45
    labels_fit(sets)


def test_pictures_kept_as_paths_are_read(tmp_path):
    paths = [str(photograph(tmp_path / "p" / f"{i}.png", i % 3, format="PNG")) for i in range(30)]
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": path} for path in paths], "label": [i % 3 for i in range(30)]},
        datasets.Features(PICTURES),
    )
    table.save_to_disk(tmp_path / "d")
    labels_fit(load(tmp_path / "d"))


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [("string", ["a", "b", "c"], ["a", "b", "c"]), ("int64", [3, 20, 100], ["3", "20", "100"])],
)
def test_classes_may_be_text_or_whole_numbers_in_a_column_that_is_named(tmp_path, kind, values, expected):
    features = {"image": datasets.Image(), "kind": datasets.Value(kind)}
    content = {"image": rows(30)["image"], "kind": [values[i % 3] for i in range(30)]}
    folder = saved(tmp_path / "d", features, train=content)
    with pytest.raises(DataError, match=rf"no columns of type ClassLabel: image \(Image\), kind \({kind}\)"):
        load(folder)
    sets = load(folder, label_column="kind")
    assert sets.class_names == expected
    labels_fit(sets)


def test_columns_that_are_unclear_unknown_or_of_another_type_are_named(tmp_path):
    features = {**PICTURES, "mask": datasets.Image(), "score": datasets.Value("float32")}
    extra = {"mask": rows(30)["image"], "score": [0.5] * 30}
    folder = saved(tmp_path / "d", features, train=rows(30, **extra))
    with pytest.raises(DataError, match=r"2 columns of type Image: .*\n  choose one with data.image_column=NAME"):
        load(folder)
    labels_fit(load(folder, image_column="image"))
    with pytest.raises(ConfigError, match=r"data.image_column=imag: did you mean 'image'"):
        load(folder, image_column="imag")
    with pytest.raises(ConfigError, match=r"data.image_column=score holds float32"):
        load(folder, image_column="score")
    with pytest.raises(ConfigError, match=r"data.label_column=score holds float32"):
        load(folder, image_column="image", label_column="score")


def test_labels_that_are_missing_or_unknown_to_train_are_named_with_their_row(tmp_path):
    folder = saved(tmp_path / "d", train={**rows(30), "label": [None] + [i % 3 for i in range(29)]})
    with pytest.raises(DataError, match=r"1 row\(s\) of train have a label .* first None in row 0"):
        load(folder)
    features = {"image": datasets.Image(), "label": datasets.Value("string")}
    split = {"train": {**rows(30), "label": ["a", "b", "c"] * 10}, "validation": {**rows(3), "label": ["a", "z", "c"]}}
    with pytest.raises(DataError, match=r"1 row\(s\) of val have a label .* first 'z' in row 1"):
        load(saved(tmp_path / "e", features, **split), label_column="label")


def test_a_missing_and_a_damaged_picture_are_listed_or_left_out(tmp_path):
    content = rows(60)
    content["image"][3] = None
    content["image"][4] = {"bytes": encoded(1)[:200], "path": None}
    folder = saved(tmp_path / "d", train=content)
    with pytest.raises(DataError, match=r"2 of 60 pictures cannot be read: .*/train\[3\]: no picture in this row"):
        load(folder)
    for cache in ("none", "memory", "disk"):
        sets = load(folder, on_error="skip", max_bad=0.1, cache=cache)
        assert sets.skipped == 2
        labels_fit(sets)


def test_a_folder_of_something_else_and_a_set_without_train_are_refused(tmp_path):
    (tmp_path / "e").mkdir()
    with pytest.raises(DataError, match=r"(?s)give a folder written by save_to_disk"):
        load(tmp_path / "e")
    with pytest.raises(DataError, match=r"has no train split, but test"):
        load(saved(tmp_path / "d", test=rows(9)))
    with pytest.raises(ConfigError, match="which data set"):
        HuggingFace().load(8, 1.0, 0)


def test_a_name_on_the_hub_opens_no_connection_unless_a_download_is_asked_for(no_network, monkeypatch):
    with pytest.raises(DataError, match=r"download it with data.download=true") as error:
        load("someone/some-set")
    assert no_network == []
    assert str(error.value).count("\n") <= 2
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(DataError, match=r"data=hf: someone/some-set: .*\n  check the name"):
        load("someone/some-set", download=True)
    assert no_network != []
    assert not datasets.config.HF_HUB_OFFLINE


def test_batches_are_the_same_with_any_number_of_workers(tmp_path):
    sets = load(write_hf(tmp_path / "d"))
    made = []
    for workers in (0, 2):
        loader = Loader(sets, LoaderConfig(8, 0, torch.device("cpu"), "host", workers=workers))
        made.append([batch.images.clone() for batch in loader.train_batches(0)])
    assert all(torch.equal(one, two) for one, two in zip(*made, strict=True))
