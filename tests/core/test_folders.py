"""Finding files below a folder, one folder at a time."""

import os

import pytest

from cvtrain.core.folders import files_below, is_picture


def test_files_come_in_the_order_of_their_paths_without_hidden_and_system_ones(tmp_path):
    names = ["b.png", "a/z.png", "a.png", "a-b.png", "a/b/c.txt", "ab/x.png", "Z.png"]
    for name in [*names, ".hidden.png", "Thumbs.db", "a/.git/x.png", "__MACOSX/x.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = list(files_below(str(tmp_path), set()))
    assert found == sorted(str(tmp_path / name) for name in names)
    assert [path for path in found if not is_picture(path)] == [str(tmp_path / "a/b/c.txt")]
    assert list(files_below(f"{tmp_path}/", set())) == found


def test_links_are_followed_but_no_real_folder_is_entered_twice(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.png").touch()
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self").symlink_to(tmp_path / "in" / "self")
    for name in ("one", "two"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "outside")
    found = [os.path.relpath(path, tmp_path / "in") for path in files_below(str(tmp_path / "in"), set())]
    assert found == ["one/x.png", "self"]


def test_a_folder_that_vanishes_is_told_and_costs_nothing_else(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").touch()
    errors = []
    walk = files_below(str(tmp_path), set(), errors.append)
    found = [next(walk)]
    (tmp_path / "b" / "x.png").unlink()
    (tmp_path / "b").rmdir()
    found += walk
    assert [os.path.relpath(path, tmp_path) for path in found] == ["a/x.png", "c/x.png"]
    assert [os.path.relpath(error.filename, tmp_path) for error in errors] == ["b"]
    with pytest.raises(FileNotFoundError):
        list(files_below(str(tmp_path / "b"), set()))


def test_names_are_taken_folder_by_folder(tmp_path, monkeypatch):
    for number in range(30):
        (tmp_path / f"{number:02}").mkdir()
        (tmp_path / f"{number:02}" / "x.png").touch()
    opened, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: opened.append(path) or scandir(path))
    next(files_below(str(tmp_path), set()))
    assert len(opened) == 2
