"""Durable files."""

import errno
import hashlib
import json
import subprocess
import sys

import pytest

from cvtrain.core.files import (
    is_full,
    sha256,
    storage_error,
    sweep,
    sync_folder,
    to_json_line,
    write_atomic,
    write_json,
    write_temporary,
)
from cvtrain.errors import StorageError

FULL = """
import resource, sys
from pathlib import Path
from cvtrain.core.files import write_atomic
from cvtrain.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
path = Path(sys.argv[1])
write_atomic(path, b"n" * 90_000) if sys.argv[2] == "fits" else None
try:
    write_atomic(path, [b"n" * 50_000] * 6)
except StorageError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_made_and_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "file.txt"
    write_atomic(path, "first")
    assert path.read_text() == "first"
    write_atomic(path, b"second\n")
    assert path.read_bytes() == b"second\n"
    assert names(tmp_path) == ["file.txt"]


def test_a_reader_who_holds_the_old_file_open_keeps_the_old_content(tmp_path):
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    with path.open() as reader:
        write_atomic(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("kind", ["kept", "fits"])
def test_a_full_disk_leaves_the_old_content_and_no_temporary_file(tmp_path, kind):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", FULL, str(path), kind], capture_output=True, text=True, check=False)
    assert done.returncode == StorageError.exit_code == 6
    assert f"disk full: {path} needs 0.3 MB" in done.stdout
    assert "resume=auto" in done.stdout
    assert path.read_bytes() == (b"old" if kind == "kept" else b"n" * 90_000)
    assert names(tmp_path) == ["file.bin"]


def test_a_missing_folder_is_a_storage_error_that_names_the_path_and_the_fix(tmp_path):
    path = tmp_path / "absent" / "file.txt"
    with pytest.raises(StorageError, match=r"cannot write .*absent/file\.txt: No such file.*output_dir=DIR"):
        write_atomic(path, "x")


def test_a_target_that_cannot_be_replaced_leaves_no_temporary_file(tmp_path):
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(StorageError, match="cannot write"):
        write_atomic(tmp_path / "taken", "x")
    assert names(tmp_path) == ["taken"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_way_a_disk_says_that_it_is_full_gets_the_sizes_and_the_fix(tmp_path, number):
    message = str(storage_error(tmp_path / "x", OSError(number, "text"), needed=2_500_000))
    assert "needs 2.5 MB" in message
    assert "MB are free" in message
    assert str(storage_error(tmp_path / "x", OSError(errno.EIO, "input/output error"))).startswith("cannot write")


def test_json_turns_nan_and_infinities_into_null_at_every_depth(tmp_path):
    inf = float("inf")
    value = {"a": float("nan"), "b": [1.5, inf, {"c": (-inf, 2)}], 3: "nan", "d": None, "e": True}
    write_json(tmp_path / "x.json", value)
    expected = {"a": None, "b": [1.5, None, {"c": [None, 2]}], "3": "nan", "d": None, "e": True}

    def refuse(text):
        raise AssertionError(text)

    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse) == expected
    line = to_json_line(value)
    assert "\n" not in line
    assert json.loads(line, parse_constant=refuse) == expected


def test_sha256_is_the_hash_of_the_bytes(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_syncing_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "absent")


def test_pieces_are_written_one_behind_the_other_with_their_hash(tmp_path):
    pieces = [b"head", memoryview(bytes(range(256)) * 999), b""]
    temporary = write_temporary(tmp_path / "x", iter(pieces))
    content = b"".join(pieces)
    assert temporary.path.read_bytes() == content
    assert (temporary.digest, temporary.size) == (hashlib.sha256(content).hexdigest(), len(content))
    assert names(tmp_path) == [temporary.path.name]


def test_what_a_killed_process_left_is_swept_at_every_depth_and_nothing_else(tmp_path):
    (tmp_path / "weights").mkdir()
    for name in (".status.json.tmp-7", "weights/.last.safetensors.tmp-123"):
        (tmp_path / name).write_bytes(b"torn")
    (tmp_path / "weights" / ".int8.tmp-x").mkdir()
    (tmp_path / "weights" / ".int8.tmp-x" / "float.onnx").write_bytes(b"torn")
    for name in ("notes.tmp-1", ".hidden", "weights/last.safetensors"):
        (tmp_path / name).write_bytes(b"kept")
    sweep(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        ".hidden", "notes.tmp-1", "weights/last.safetensors",
    ]  # fmt: skip
    assert not (tmp_path / "weights" / ".int8.tmp-x").exists()


@pytest.mark.parametrize(("number", "full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_a_full_disk_is_told_from_one_that_fails(tmp_path, monkeypatch, number, full):
    def fail(descriptor):
        raise OSError(number, "text")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(StorageError) as caught:
        write_atomic(tmp_path / "x", b"content")
    assert is_full(caught.value) == full
    assert names(tmp_path) == []
