"""data=csv: a table of paths and labels."""

import numpy as np
import pytest
from real_formats import class_of, photograph, write_csv

from cvtrain.data import CSV
from cvtrain.errors import ConfigError, DataError

NAMES = ("blue", "green", "red")


def load(file, **changes):
    data = CSV(**{"root": str(file), **changes})
    return data.load(8, 1.0, 2)


def pictures(root, count=12):
    """`count` pictures of each class; returns (relative path, class) pairs."""
    return [
        (f"p/{number}_{i}.jpg", name)
        for number, name in enumerate(NAMES)
        for i in range(count)
        if photograph(root / f"p/{number}_{i}.jpg", number)
    ]


def table(root, rows, header="path,label", delimiter=",", encoding="utf-8"):
    lines = [header.replace(",", delimiter), *(delimiter.join(row) for row in rows)]
    file = root / "labels.csv"
    file.write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return file


def labels_fit(sets):
    for source in (sets.train, sets.val, sets.test):
        read = [class_of(picture) for picture in source.read(np.arange(len(source))).numpy()]
        assert [NAMES[number] for number in read] == [sets.class_names[label] for label in source.labels.tolist()]


def snapshot(root):
    return sorted((str(p), p.lstat().st_mtime_ns, p.lstat().st_size) for p in root.rglob("*"))


def test_a_table_without_splits_is_carved_stratified_and_nothing_is_written(tmp_path):
    file = write_csv(tmp_path, count=20)
    before = snapshot(tmp_path)
    sets = load(file)
    assert sets.counts() == {"train": 42, "val": 6, "test": 12, "skipped": 0}
    assert sets.class_names == ["blue", "green", "red"]
    labels_fit(sets)
    assert np.bincount(sets.test.labels).tolist() == [4, 4, 4]
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_delimiter_and_byte_order_mark_are_recognised(tmp_path, delimiter, encoding):
    assert load(table(tmp_path, pictures(tmp_path), delimiter=delimiter, encoding=encoding)).counts()["train"] == 27


def test_splits_are_taken_as_they_are_and_classes_come_from_train(tmp_path):
    rows = [
        (path, label, ("train", "Validation", " test ")[min(2, int(path.split("_")[1][:-4]) // 5)])
        for path, label in pictures(tmp_path)
    ]
    sets = load(table(tmp_path, rows, "path,label,split"))
    assert sets.counts() == {"train": 15, "val": 15, "test": 6, "skipped": 0}
    labels_fit(sets)
    assert not any("carved" in note for note in sets.notes)


def test_columns_may_come_in_any_order_and_others_are_left_out(tmp_path):
    rows = [("7", label, "x,y", path) for path, label in pictures(tmp_path)]
    sets = load(table(tmp_path, rows, "id;Label;box;PATH", delimiter=";"))
    labels_fit(sets)
    assert sets.test.names[0].startswith("p/")


def test_quotes_commas_unicode_and_windows_line_ends_are_read(tmp_path):
    rows = pictures(tmp_path)
    odd = tmp_path / 'p/ä, "b"\u2028.jpg'
    (tmp_path / rows[0][0]).rename(odd)
    text = "path,label\r\n" + "\r\n".join(f"{path},{label}" for path, label in rows[1:])
    file = tmp_path / "labels.csv"
    file.write_bytes((text + '\r\n\r\n"p/ä, ""b""\u2028.jpg","blue"\r\n').encode())
    sets = load(file)
    assert sum(sets.counts().values()) == 36
    labels_fit(sets)


def test_absolute_paths_are_read(tmp_path):
    rows = [(str(tmp_path / path), label) for path, label in pictures(tmp_path)]
    (tmp_path / "elsewhere").mkdir()
    labels_fit(load(table(tmp_path / "elsewhere", rows)))


def test_all_wrong_lines_are_named_at_once_with_their_numbers(tmp_path):
    rows = [(path, label, "train") for path, label in pictures(tmp_path)]
    rows += [("p/gone.jpg", "red", "train"), (rows[0][0], "red", "train"), (rows[1][0], "blue", "val")]
    rows += [("p/x.jpg", "", "train"), ("", "red", "train"), (rows[2][0], "red", "holdout"), ("p/x.jpg",)]
    photograph(tmp_path / "p/new.jpg", 1)
    rows += [("p/new.jpg", "violet", "val")]
    with pytest.raises(DataError) as error:
        load(table(tmp_path, rows, "path,label,split"))
    text = str(error.value)
    assert text.count("\n") <= 2
    assert str(tmp_path / "labels.csv") in text
    assert "8 wrong line(s)" in text
    for said in [
        "line 38: no file p/gone.jpg",
        "line 39: p/0_0.jpg is 'red', but 'blue' in line 2",
        "line 40: p/0_1.jpg is in val, and in train in line 3",
        "line 41: no label",
        "line 42: no path",
        "line 43: split 'holdout', expected train, val or test",
        "line 44: 1 cell(s) of 3",
        "line 45: label 'violet' of val is not in train",
    ]:
        assert said in text
    assert len(error.value.details) == 8


def test_a_long_list_of_wrong_lines_is_cut_but_complete_in_the_details(tmp_path):
    with pytest.raises(DataError, match=r"… and 30 more") as error:
        load(table(tmp_path, [(f"{i}.jpg", "a") for i in range(40)]))
    assert len(error.value.details) == 40


def test_a_missing_or_unreadable_file_is_left_out_and_counted_when_that_is_asked_for(tmp_path):
    rows = pictures(tmp_path)
    (tmp_path / rows[0][0]).unlink()
    (tmp_path / rows[1][0]).write_bytes(b"")
    sets = load(table(tmp_path, rows), on_error="skip", max_bad=0.1)
    assert sets.skipped == 2
    labels_fit(sets)


def test_a_repeated_line_is_left_out_and_named(tmp_path):
    rows = pictures(tmp_path)
    sets = load(table(tmp_path, [*rows, rows[3], ("./" + rows[4][0], rows[4][1])]))
    assert sum(sets.counts().values()) == 36
    assert any("2 line(s) repeat an earlier picture and are left out: line 38, 39" in note for note in sets.notes)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no columns 'path' and 'label' in line 1"),
        (b"file,class\na,b\n", "no columns 'path' and 'label' in line 1: 'file,class'"),
        (b"path,label,label\n", "line 1 has label twice"),
        (b"path,label\n", "no picture for training among 0"),
        (b"path,label\na.jpg,\xff\n", r"line 2 is not UTF-8 \(byte 0xff\)"),
        ("path,label\n".encode("utf-16"), "line 1 is not UTF-8"),
        (b'path,label\n"a.jpg,b\n', "line 2: unexpected end of data"),
        (b"path,label\na\0.jpg,b\n", "line 2: no path"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(tmp_path, body, said):
    (tmp_path / "x.csv").write_bytes(body)
    with pytest.raises(DataError, match=said) as error:
        load(tmp_path / "x.csv")
    assert "x.csv" in str(error.value)


def test_an_absent_file_a_folder_and_no_file_at_all_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"gone.csv: No such file.*\n.*data.root=FILE.csv"):
        load(tmp_path / "gone.csv")
    with pytest.raises(DataError, match="Is a directory"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"give it with data.root=FILE.csv"):
        CSV().load(8, 1.0, 0)


def test_several_labels_become_rows_of_zeros_and_ones_and_an_empty_cell_none(tmp_path):
    rows = []
    for i in range(30):
        photograph(tmp_path / f"{i}.jpg", i % 3)
        rows.append((f"{i}.jpg", ["sea | sand", "sand", ""][i % 3]))
    sets = load(table(tmp_path, rows), label_separator="|")
    assert sets.multilabel
    assert sets.class_names == ["sand", "sea"]
    for source in (sets.train, sets.val, sets.test):
        assert source.labels.dtype == np.uint8
        kinds = [class_of(picture) for picture in source.read(np.arange(len(source))).numpy()]
        assert source.labels.tolist() == [[[1, 1], [1, 0], [0, 0]][kind] for kind in kinds]


def test_limits_and_folds_spread_combinations_of_labels_evenly(tmp_path):
    rows = []
    for i in range(60):
        photograph(tmp_path / f"{i}.jpg", i % 3)
        rows.append((f"{i}.jpg", ["sea|sand", "sand", ""][i % 3]))
    file = table(tmp_path, rows)
    assert load(file, label_separator="|", limit=9).train.labels.sum(axis=0).tolist() == [6, 3]
    tested = [load(file, label_separator="|", folds=4, fold=fold).test for fold in range(4)]
    assert sorted(name for source in tested for name in source.names) == sorted(path for path, _ in rows)
    assert all(source.labels.sum(axis=0).tolist() == [10, 5] for source in tested)


def test_without_a_separator_a_cell_is_one_label(tmp_path):
    rows = [(path, f"{label}|x") for path, label in pictures(tmp_path)]
    sets = load(table(tmp_path, rows))
    assert (sets.class_names, sets.multilabel) == (["blue|x", "green|x", "red|x"], False)


def test_labels_that_are_all_empty_or_a_separator_of_nothing_are_refused(tmp_path):
    rows = [(path, "") for path, _ in pictures(tmp_path)]
    with pytest.raises(DataError, match="no picture for training has a label"):
        load(table(tmp_path, rows), label_separator="|")
    with pytest.raises(ConfigError, match=r"data.label_separator is empty"):
        load(table(tmp_path, rows), label_separator=" ")


def test_from_the_command_line_several_labels_train_and_a_wrong_line_ends_with_exit_code_3(cvtrain, tmp_path):
    rows = []
    for i in range(40):
        photograph(tmp_path / f"d/{i}.jpg", i % 3)
        rows.append((f"{i}.jpg", ["sea|sand", "sand", ""][i % 3]))
    file = table(tmp_path / "d", rows)
    quick = ["img_size=16", "epochs=1", "batch_size=16", "compression=none", "export=none", "device=cpu", "workers=0"]
    several = ["data.label_separator=|", "task=multilabel", "loss=bce", "json=true"]
    answer = cvtrain("data=csv", f"data.root={file}", *several, *quick)
    assert answer.code == 0, answer.err
    assert answer.json["data"] == {"train": 28, "val": 3, "test": 9, "skipped": 0}
    with file.open("a") as stream:
        stream.write("gone.jpg,sea\n")
    answer = cvtrain("data=csv", f"data.root={file}", *several, *quick)
    assert answer.code == 3
    assert "line 42: no file gone.jpg" in answer.err
