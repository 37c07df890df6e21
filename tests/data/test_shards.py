"""data=shards: WebDataset's tar files, local and over HTTP from a real server in a thread."""

import contextlib
import http.server
import importlib.machinery
import importlib.util
import io
import json
import multiprocessing
import os
import resource
import socket
import subprocess
import tarfile
import threading
import time
import urllib.parse
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from real_formats import add, class_of, encoded, photograph, write_shards

from cvtrain.data import Loader, LoaderConfig, Shards, remote
from cvtrain.data.shards import expand
from cvtrain.errors import ConfigError, DataError, StorageError

WRITE_SHARDS = Path(__file__).parents[2] / "scripts" / "write-shards"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and no proxy between the test and its server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    return tmp_path / "cache" / "cvtrain"


def write(*arguments):
    """Run scripts/write-shards in this process, which has imported torch already."""
    loader = importlib.machinery.SourceFileLoader("write_shards", str(WRITE_SHARDS))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("write_shards", loader))
    loader.exec_module(module)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.argv", ["write-shards", *map(str, arguments)])
        patch.setattr("sys.dont_write_bytecode", True)
        return module.main(), err.getvalue()


def load(root, **changes):
    return Shards(**{"root": str(root), "cache": "none", **changes}).load(8, 1.0, 2)


def labels_fit(sets, names=None):
    for source in (sets.train, sets.val, sets.test):
        read = [class_of(picture) for picture in source.read(np.arange(len(source))).numpy()]
        assert [(names or sets.class_names)[n] if names else str(n) for n in read] == [
            sets.class_names[label] for label in source.labels.tolist()
        ]


def snapshot(root):
    return sorted((str(p), p.lstat().st_mtime_ns, p.lstat().st_size) for p in root.rglob("*"))


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; counts the shards it sends, answers 503 or breaks off as often as it is told."""

    daemon_threads = True

    def __init__(self, folder):
        self.fetched = Counter()
        self.head = True
        self.broken = 0
        self.cut = 0
        server = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=str(folder))

            def do_GET(self):
                name = urllib.parse.urlsplit(self.path).path.rpartition("/")[2]
                server.fetched[name] += name.endswith(".tar")
                if server.broken and name.endswith(".tar"):
                    server.broken -= 1
                    self.send_error(503)
                    return
                super().do_GET()

            def do_HEAD(self):
                return super().do_HEAD() if server.head else self.send_error(403)

            def copyfile(self, source, outputfile):
                content = source.read()
                if server.cut:
                    server.cut -= 1
                    outputfile.write(content[: len(content) // 2])
                    return
                with contextlib.suppress(OSError):
                    outputfile.write(content)

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(folder):
        server = Server(folder)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def large(root, shards=6, count=8, classes=2):
    """Shards of about 1.3 MB, so that asking for one's size is not sending it whole."""
    root.mkdir()
    noise = np.random.default_rng(0)
    for number in range(shards):
        with tarfile.open(root / f"s-{number:02}.tar", "w") as archive:
            for i in range(count):
                add(archive, f"{number * count + i:04}.jpg", encoded(i % classes))
                add(archive, f"{number * count + i:04}.cls", str(i % classes).encode())
            add(archive, "ballast.bin", noise.bytes(1 << 20) + bytes(300_000))
    return root


def fetched(server):
    """How often each shard was."""
    return {name: count for name, count in server.fetched.items() if count}


def test_shards_written_by_webdataset_are_read_with_their_labels(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "s").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "s" / "set-%04d.tar"), maxcount=20, verbose=0) as writer:
        for i in range(60):
            form = ("jpg", "png", "webp")[i % 3]
            kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[form]
            writer.write({"__key__": f"part/{i:05}", form: encoded(i % 4, format=kind), "cls": i % 4, "json": {"i": i}})
    before = snapshot(tmp_path / "s")
    sets = load(tmp_path / "s")
    assert sets.counts() == {"train": 40, "val": 8, "test": 12, "skipped": 0}
    labels_fit(sets)
    assert sets.class_names == ["0", "1", "2", "3"]
    assert sets.train.names[0].startswith("set-0000.tar/part/0000")
    assert snapshot(tmp_path / "s") == before


def test_webdataset_reads_the_shards_of_write_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for i in range(12):
        photograph(tmp_path / "d" / ("cat", "dog")[i % 2] / f"{i}.x.jpg", i % 2)
    subprocess.run([WRITE_SHARDS, tmp_path / "d", tmp_path / "s", "--shard-mb", "0.01"], check=True)
    urls = sorted(str(path) for path in (tmp_path / "s").glob("*.tar"))
    assert len(urls) > 1
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert sorted(sample["cls"] for sample in read) == [0] * 6 + [1] * 6
    assert [class_of(sample["jpg"].transpose(2, 0, 1)) for sample in read] == [sample["cls"] for sample in read]


def test_write_shards_keeps_splits_and_class_names_mixes_and_changes_nothing(tmp_path):
    for split, count in (("train", 30), ("val", 6), ("test", 4)):
        for i in range(count):
            photograph(tmp_path / "d" / split / ("a", "b")[i % 2] / f"ü {i}.JPG", i % 2)
    before = snapshot(tmp_path / "d")
    command = [tmp_path / "d", tmp_path / "s", "--shard-mb", "0.02"]
    assert write(*command) == (0, "")
    assert snapshot(tmp_path / "d") == before
    sets = load(tmp_path / "s")
    assert sets.counts() == {"train": 30, "val": 6, "test": 4, "skipped": 0}
    assert sets.class_names == ["a", "b"]
    labels_fit(sets, ["a", "b"])
    assert set(sets.train.labels[:10].tolist()) == {0, 1}
    assert not any("carved" in note or "one class only" in note for note in sets.notes)
    code, said = write(*command)
    assert (code, "is not empty" in said) == (3, True)
    assert write(tmp_path / "d", tmp_path / "d" / "s")[0] == 3
    assert snapshot(tmp_path / "d") == before


def test_write_shards_names_unreadable_pictures_or_leaves_them_out(tmp_path):
    for i in range(6):
        photograph(tmp_path / "d" / ("a", "b")[i % 2] / f"{i}.jpg", i % 2)
    (tmp_path / "d" / "a" / "bad.jpg").write_bytes(b"")
    code, said = write(tmp_path / "d", tmp_path / "s")
    assert (code, "a/bad.jpg: empty file" in said) == (3, True)
    assert not (tmp_path / "s").exists()
    assert write(tmp_path / "d", tmp_path / "s", "--skip")[0] == 0
    entry = json.loads((tmp_path / "s" / "index.json").read_text())["shards"]["train-000000.tar"]
    assert len(entry["samples"]) == 6


def test_index_json_saves_the_pass_over_the_shards_unless_they_changed_since(tmp_path, monkeypatch):
    for i in range(20):
        photograph(tmp_path / "d" / ("a", "b")[i % 2] / f"{i}.jpg", i % 2)
    assert write(tmp_path / "d", tmp_path / "s")[0] == 0
    passes = []
    from cvtrain.data import shards, tars

    monkeypatch.setattr(shards, "index_tar", lambda *args: passes.append(args) or tars.index_tar(*args))
    load(tmp_path / "s")
    assert passes == []
    path = tmp_path / "s" / "train-000000.tar"
    content = path.read_bytes()
    (tmp_path / "s" / "train-000000.tar").write_bytes(content)  # of the same size, but later
    labels_fit(load(tmp_path / "s"), ["a", "b"])
    assert len(passes) == 1
    labels_fit(load(tmp_path / "s"), ["a", "b"])
    assert len(passes) == 1  # now kept in the cache


def test_an_index_that_points_outside_a_shard_or_is_something_else_is_not_used(tmp_path):
    for i in range(20):
        photograph(tmp_path / "d" / ("a", "b")[i % 2] / f"{i}.jpg", i % 2)
    assert write(tmp_path / "d", tmp_path / "s")[0] == 0
    path = tmp_path / "s" / "index.json"
    content = json.loads(path.read_text())
    content["shards"]["train-000000.tar"]["samples"][3][2] = 10**9
    for text in (
        json.dumps(content),
        "{",
        "[]",
        '{"format": "cvtrain-shards-1"}',
        '{"wids_version": 1, "shardlist": []}',
    ):
        path.write_text(text)
        labels_fit(load(tmp_path / "s"), ["a", "b"])


def test_names_in_a_folder_say_the_split(tmp_path):
    for prefix in ("train", "val", "test"):
        write_shards(tmp_path / "s", shards=1, prefix=prefix)
    sets = load(tmp_path / "s")
    assert sets.counts() == {"train": 20, "val": 20, "test": 20, "skipped": 0}
    assert all(name.startswith("val-") for name in sets.val.names)
    write_shards(tmp_path / "s", shards=1, prefix="other")
    with pytest.raises(DataError, match=r"other-000000.tar names no split"):
        load(tmp_path / "s")


def test_splits_may_be_given_as_roots_of_their_own(tmp_path):
    for split in ("a", "b", "c"):
        write_shards(tmp_path / split, shards=2)
    roots = {"val_root": str(tmp_path / "b"), "test_root": str(tmp_path / "c" / "shard-{000000..000001}.tar")}
    assert load(tmp_path / "a", **roots).counts() == {"train": 40, "val": 40, "test": 40, "skipped": 0}
    with pytest.raises(DataError, match="is given twice"):
        load(tmp_path / "a", val_root=str(tmp_path / "a"))
    (tmp_path / "link.tar").symlink_to(tmp_path / "a" / "shard-000001.tar")
    with pytest.raises(DataError, match=r"shard-000001.tar is given twice"):
        load(tmp_path / "a", test_root=str(tmp_path / "link.tar"))
    write_shards(tmp_path / "d", prefix="val")
    write_shards(tmp_path / "d", prefix="train")
    with pytest.raises(ConfigError, match=r"holds val shards too"):
        load(tmp_path / "d", val_root=str(tmp_path / "b"))
    for path in (tmp_path / "d").glob("train*"):
        path.unlink()
    with pytest.raises(DataError, match="no shard of train in"):
        load(tmp_path / "d")


def test_braces_expand_as_in_a_shell():
    assert expand("a/{008..011}.tar") == ["a/008.tar", "a/009.tar", "a/010.tar", "a/011.tar"]
    assert expand("{x,y}-{0..1}") == ["x-0", "x-1", "y-0", "y-1"]
    for wrong in ("{3..1}", "{a}", "{0..1", "}", "{}", "{a..c}"):
        with pytest.raises(ConfigError):
            expand(wrong)


def test_class_names_come_from_classes_txt_and_must_cover_the_numbers(tmp_path):
    write_shards(tmp_path / "s")
    (tmp_path / "s" / "classes.txt").write_text("cat\ndog\nowl\n")
    assert load(tmp_path / "s").class_names == ["cat", "dog", "owl"]
    (tmp_path / "s" / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match="class 2 in the shards, but 2 class names"):
        load(tmp_path / "s")
    write_shards(tmp_path / "v")
    (tmp_path / "v" / "classes.txt").write_text("dog\ncat\nowl\n")
    (tmp_path / "s" / "classes.txt").write_text("cat\ndog\nowl\n")
    with pytest.raises(DataError, match="are others than those of training"):
        load(tmp_path / "s", val_root=str(tmp_path / "v"))


def test_numbers_with_gaps_are_named_by_themselves_and_unknown_ones_of_val_refused(tmp_path):
    def write(folder, numbers):
        folder.mkdir()
        with tarfile.open(folder / "x.tar", "w") as archive:
            for i in range(20):
                number = numbers[i % len(numbers)]
                add(archive, f"{i}.jpg", encoded(number))
                add(archive, f"{i}.cls", f"{number}\n".encode())

    write(tmp_path / "a", [3, 7])
    write(tmp_path / "b", [7, 8])
    sets = load(tmp_path / "a")
    assert sets.class_names == ["3", "7"]
    labels_fit(sets)
    with pytest.raises(DataError, match=r"class 8 of val is not among the 2 of training, first at .*b/x.tar:1.jpg"):
        load(tmp_path / "a", val_root=str(tmp_path / "b"))


def test_samples_that_are_none_are_listed_at_once_or_left_out_and_counted(tmp_path):
    write_shards(tmp_path / "s", shards=1)
    with tarfile.open(tmp_path / "s" / "x.tar", "w") as archive:
        add(archive, "__meta__.json", b"{}")
        add(archive, "README", b"no sample")
        add(archive, "no_class.jpg", encoded(0))
        add(archive, "no_picture.cls", b"1")
        add(archive, "two.jpg", encoded(0))
        add(archive, "two.png", encoded(0, format="PNG"))
        add(archive, "two.cls", b"0")
        add(archive, "text.jpg", encoded(0))
        add(archive, "text.cls", b"cat")
        add(archive, "minus.jpg", encoded(0))
        add(archive, "minus.cls", b"-1")
        add(archive, "good.JPG", encoded(1))
        add(archive, "good.cls", b" 1\n")
        add(archive, "damaged.jpg", encoded(1)[:100])
        add(archive, "damaged.cls", b"1")
        add(archive, "empty.jpg", b"")
        add(archive, "empty.cls", b"1")
    with pytest.raises(DataError, match="5 of 28 pictures cannot be read") as error:
        load(tmp_path / "s")
    where = f"{tmp_path / 's' / 'x.tar'}:"
    assert sorted(error.value.details) == sorted(
        [
            f"{where}no_class: no .cls file",
            f"{where}no_picture: no picture",
            f"{where}two: several pictures",
            f"{where}text: class 'cat' in .cls, expected a whole number",
            f"{where}minus: class '-1' in .cls, expected a whole number",
        ]
    )
    for setting in ("none", "memory", "disk"):
        sets = load(tmp_path / "s", on_error="skip", max_bad=0.5, cache=setting)
        assert sets.skipped == 7
        assert f"{where}empty.jpg: empty file" in sets.bad
        labels_fit(sets)


def test_names_that_point_elsewhere_are_never_written_to_and_links_not_followed(tmp_path):
    secret = photograph(tmp_path / "secret.jpg", 1)
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s" / "x.tar", "w") as archive:
        for i in range(20):
            for name in (f"../../up{i}", f"/{tmp_path}/absolute{i}"):
                add(archive, f"{name}.jpg", encoded(i % 2))
                add(archive, f"{name}.cls", str(i % 2).encode())
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"link{kind.decode()}.jpg")
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)
            add(archive, f"link{kind.decode()}.cls", b"1")
    before = {str(path) for path in tmp_path.rglob("*")}
    sets = load(tmp_path / "s", on_error="skip", max_bad=0.5)
    labels_fit(sets)
    assert sets.skipped == 4
    assert sum("not followed" in line for line in sets.bad) == 4
    made = {str(path) for path in tmp_path.rglob("*")} - before
    assert all(Path(path).is_relative_to(tmp_path / "cache") for path in made)


@pytest.mark.parametrize("end", [-1, -700, 1024 + 300, 1536, 5000, 0], ids=str)
def test_a_shard_that_was_cut_off_anywhere_is_named(tmp_path, end):
    write_shards(tmp_path / "s", shards=2)
    path = tmp_path / "s" / "shard-000001.tar"
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    content = path.read_bytes()
    used = last.offset_data + 512
    # tarfile fills up to 10 KiB with zeros, which nobody misses.
    path.write_bytes(content[: used + end] if end < 0 else content[:end])
    with pytest.raises(DataError, match=r"shard-000001.tar: truncated"):
        load(tmp_path / "s")


def test_a_shard_cut_off_between_two_samples_is_named(tmp_path):
    write_shards(tmp_path / "s", shards=2)
    path = tmp_path / "s" / "shard-000001.tar"
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[10].offset
    path.write_bytes(path.read_bytes()[:offset])
    with pytest.raises(DataError, match=rf"shard-000001.tar: truncated or damaged at byte {offset}"):
        load(tmp_path / "s")


def test_a_header_damaged_in_the_middle_a_compressed_shard_and_no_shard_are_named(tmp_path):
    write_shards(tmp_path / "s", shards=1)
    path = tmp_path / "s" / "shard-000000.tar"
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[10].offset
    content = path.read_bytes()
    path.write_bytes(content[:offset] + b"x" * 20 + content[offset + 20 :])
    with pytest.raises(DataError, match=f"damaged at byte {offset}"):
        load(tmp_path / "s")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        add(archive, "a.jpg", encoded(0))
    path.write_bytes(stream.getvalue())
    with pytest.raises(DataError, match=r"(?s)no uncompressed tar file.*unpacked"):
        load(tmp_path / "s")
    with pytest.raises(DataError, match=r"gone.tar: No such file"):
        load(tmp_path / "gone.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no .tar file in"):
        load(tmp_path / "empty")
    with tarfile.open(tmp_path / "empty" / "x.tar", "w") as archive:
        add(archive, "README", b"")
    with pytest.raises(DataError, match="no samples in 1 shard"):
        load(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"give them with data.root"):
        Shards().load(8, 1.0, 0)
    with pytest.raises(ConfigError, match="s3 is not read"):
        load("s3://bucket/x.tar")


def test_shards_of_one_class_each_are_noted(tmp_path):
    (tmp_path / "s").mkdir()
    for number in range(4):
        with tarfile.open(tmp_path / "s" / f"{number}.tar", "w") as archive:
            for i in range(6):
                add(archive, f"{i}.jpg", encoded(number % 2))
                add(archive, f"{i}.cls", str(number % 2).encode())
    assert any("4 of 4 training shards hold one class only" in note for note in load(tmp_path / "s").notes)


def loader(sets, workers=0):
    return Loader(sets, LoaderConfig(8, 0, torch.device("cpu"), "host", workers=workers))


def batches(made, epoch=1, start=0):
    return [(b.images.clone(), b.targets.clone(), b.indices) for b in made.train_batches(epoch, start)]


def test_batches_are_the_same_local_and_remote_with_any_number_of_workers_and_after_a_resume(tmp_path, serve):
    large(tmp_path / "s")
    server = serve(tmp_path / "s")
    local = batches(loader(load(tmp_path / "s")))
    far = load(f"{server.url}/s-{{00..05}}.tar")
    for other in (batches(loader(far)), batches(loader(far, workers=2))):
        assert len(other) == len(local)
        for one, two in zip(local, other, strict=True):
            assert torch.equal(one[0], two[0])
            assert torch.equal(one[1], two[1])
    for workers in (0, 2):
        rest = batches(loader(far, workers), start=2)
        assert all(torch.equal(one[0], two[0]) for one, two in zip(local[2:], rest, strict=True))


def test_an_epoch_visits_shards_in_windows_and_fetches_each_about_once(tmp_path, serve, cache):
    large(tmp_path / "s", shards=12)
    large(tmp_path / "v", shards=1)
    server = serve(tmp_path)
    # Of 12 training shards of 1.3 MB only 8 fit.
    far = load(f"{server.url}/s/s-{{00..11}}.tar", val_root=f"{server.url}/v/s-00.tar", test_fraction=0.1, shards_mb=11)
    server.fetched.clear()
    made = loader(far)
    largest = 0
    order = []
    for batch in made.train_batches(3):
        order += far.train.groups[batch.indices].tolist()
        held = [path.stat().st_size for path in (cache / "shards").glob("*.tar")]
        largest = max(largest, sum(held))
    last = {shard: position for position, shard in enumerate(order)}
    open_at = [{shard for shard in order[: i + 1] if last[shard] >= i} for i in range(len(order))]
    assert max(map(len, open_at)) == 4
    assert largest <= 11 << 20
    assert set(fetched(server).values()) == {1}
    assert 4 <= len(fetched(server)) <= 12
    # Workers are in two windows for a moment.
    server.fetched.clear()
    again = [batch.indices for batch in loader(far, workers=2).train_batches(3)]
    assert far.train.groups[np.concatenate(again)].tolist() == order
    assert sum(fetched(server).values()) <= 14


def test_without_an_index_the_shards_are_fetched_once_and_checked_on_the_way(tmp_path, serve, cache):
    large(tmp_path / "s")
    path = tmp_path / "s" / "s-03.tar"
    with tarfile.open(path, "a") as archive:
        add(archive, "damaged.jpg", encoded(1)[:300])
        add(archive, "damaged.cls", b"1")
    server = serve(tmp_path / "s")
    url = f"{server.url}/s-{{00..05}}.tar"
    with pytest.raises(
        DataError, match=r"1 of 49 pictures cannot be read: http://127.0.0.1:\d+/s-03.tar:damaged.jpg: "
    ):
        load(url)
    assert set(fetched(server).values()) == {1}
    sets = load(url, on_error="skip", max_bad=0.1)
    assert (sets.skipped, len(sets.train) + len(sets.val) + len(sets.test)) == (1, 48)
    labels_fit(sets)
    # A second run asks for sizes only: the index is kept, and so are the shards.
    assert fetched(server) == {f"s-{number:02}.tar": 1 for number in range(6)}


def test_an_index_beside_remote_shards_leaves_them_where_they_are_until_training(tmp_path, serve, cache):
    for i in range(40):
        photograph(tmp_path / "d" / ("a", "b")[i % 2] / f"{i}.jpg", i % 2)
    assert write(tmp_path / "d", tmp_path / "s", "--shard-mb", "0.02")[0] == 0
    count = len(list((tmp_path / "s").glob("*.tar")))
    server = serve(tmp_path / "s")
    sets = load(f"{server.url}/train-{{000000..{count - 1:06d}}}.tar")
    assert fetched(server) == {}
    assert sets.class_names == ["a", "b"]
    labels_fit(sets, ["a", "b"])
    assert set(fetched(server).values()) == {1}
    assert len(list((cache / "shards").glob("*.tar"))) == count


@pytest.mark.parametrize("setting", ["memory", "disk"])
def test_decoded_caches_work_on_remote_shards(tmp_path, serve, setting):
    large(tmp_path / "s", shards=2, count=20)
    server = serve(tmp_path / "s")
    sets = load(f"{server.url}/s-{{00..01}}.tar", cache=setting)
    labels_fit(sets)
    assert set(fetched(server).values()) == {1}


def test_a_server_that_fails_twice_or_breaks_off_is_asked_again(tmp_path, serve):
    large(tmp_path / "s", shards=1, count=40)
    server = serve(tmp_path / "s")
    server.broken = 2
    labels_fit(load(f"{server.url}/s-00.tar"))
    server.cut = 2
    server.head = False  # as of URLs signed for GET
    sets = load(f"{server.url}/s-00.tar", cache_dir=str(tmp_path / "other"))
    labels_fit(sets)


@pytest.mark.parametrize(("broken", "name", "said"), [(3, "s-00", "HTTP status 503 .* after 3 tries"), (0, "x", "404")])
def test_a_failing_status_is_named_with_the_url(tmp_path, serve, broken, name, said):
    large(tmp_path / "s", shards=1)
    server = serve(tmp_path / "s")
    server.broken = broken
    with pytest.raises(
        DataError, match=rf"{server.url}/{name}.tar: {said}|{server.url}/{name}.tar: HTTP status {said}"
    ):
        load(f"{server.url}/{name}.tar?key=secret")
    with pytest.raises(DataError) as error:
        load(f"{server.url}/gone.tar?key=secret")
    assert "secret" not in str(error.value)


def test_a_server_that_is_gone_ends_the_command_with_exit_code_3_within_seconds(tmp_path, serve, cvtrain):
    server = serve(tmp_path)
    server.shutdown()
    server.server_close()
    start = time.monotonic()
    answer = cvtrain("data=shards", f"data.root='{server.url}/x-{{00..99}}.tar'", "img_size=16", "device=cpu")
    assert answer.code == 3
    assert time.monotonic() - start < 20
    assert "refused" in answer.err
    assert f"{server.url}/x-" in answer.err
    assert "Traceback" not in answer.err


def test_a_server_that_accepts_and_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, pytest.raises(DataError, match=r"timed out after 3 tries"):
        load(f"http://127.0.0.1:{silent.getsockname()[1]}/x.tar")


def test_a_shard_that_changes_during_a_run_is_named(tmp_path, serve, cache):
    large(tmp_path / "s", shards=1, count=40)
    server = serve(tmp_path / "s")
    sets = load(f"{server.url}/s-00.tar")
    for path in (cache / "shards").glob("*.tar"):
        path.unlink()
    with tarfile.open(tmp_path / "s" / "s-00.tar", "a") as archive:
        add(archive, "new.bin", bytes(20_000))
    with pytest.raises(DataError, match=r"s-00.tar has changed since this run began"):
        sets.train.read(np.array([0]))


def test_a_limit_below_what_is_mixed_at_a_time_is_refused_with_the_least_that_works(tmp_path, serve):
    large(tmp_path / "s")
    server = serve(tmp_path / "s")
    with pytest.raises(ConfigError, match=r"data.shards_mb=2: 4 shards, mixed at a time, take 5 MiB\n  allowed: 6"):
        load(f"{server.url}/s-{{00..05}}.tar", shards_mb=2)
    assert fetched(server) == {}


def test_many_threads_that_want_one_shard_fetch_it_once(tmp_path):
    calls = []

    def fetch(descriptor):
        calls.append(1)
        time.sleep(0.05)
        os.pwrite(descriptor, b"x" * 100, 0)

    store = remote.Store(tmp_path / "store", 1000)
    read = []

    def want():
        descriptor = store.open("a.tar", 100, fetch)
        read.append(os.pread(descriptor, 100, 0))
        os.close(descriptor)

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(calls), read) == (1, [b"x" * 100] * 8)


def test_the_store_removes_what_was_used_longest_ago_and_what_a_killed_run_left(tmp_path):
    store = remote.Store(tmp_path, 350)

    def get(name):
        os.close(store.open(name, 100, lambda descriptor: os.pwrite(descriptor, b"x" * 100, 0)))
        time.sleep(0.02)

    for name in ("a.tar", "b.tar", "c.tar", "a.tar"):
        get(name)
    get("d.tar")
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["a.tar", "c.tar", "d.tar"]
    (tmp_path / ".gone.tar.tmp").write_bytes(b"y" * 100)
    os.utime(tmp_path / ".gone.tar.tmp", (0, 0))
    get("e.tar")
    assert not (tmp_path / ".gone.tar.tmp").exists()


def test_a_download_that_fails_leaves_nothing_and_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path):
    def fail(descriptor):
        raise DataError("no")

    store = remote.Store(tmp_path / "s", 1000)
    with pytest.raises(DataError):
        store.open("a.tar", 100, fail)
    assert [path.name for path in (tmp_path / "s").iterdir() if path.suffix != ".lock"] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"data.cache_dir=DIR"):
        remote.Store(tmp_path / "file" / "s", 1000).open("a.tar", 100, fail)


def test_a_full_disk_is_a_storage_error_before_the_download_and_leaves_nothing(tmp_path):
    store = remote.Store(tmp_path / "s", 1 << 20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"disk full: .* needs 0.1 MB.*\n.*lower data.shards_mb"):
            store.open("a.tar", 100_000, lambda _: pytest.fail("downloaded"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "s").iterdir() if path.suffix != ".lock"] == []


def test_a_run_that_is_killed_while_it_downloads_does_not_keep_others_from_it(tmp_path):
    started, finish = multiprocessing.get_context("fork").Event(), threading.Event()

    def hang(_):
        started.set()
        finish.wait()

    process = multiprocessing.get_context("fork").Process(
        target=lambda: remote.Store(tmp_path, 1000).open("a.tar", 100, hang)
    )
    process.start()
    assert started.wait(20)
    process.kill()
    process.join()
    assert (tmp_path / ".a.tar.tmp").exists()
    os.close(remote.Store(tmp_path, 1000).open("a.tar", 100, lambda file: os.pwrite(file, b"x" * 100, 0)))
    assert (tmp_path / "a.tar").read_bytes() == b"x" * 100


def test_reading_in_other_processes_works_without_a_network_when_everything_is_kept(tmp_path, serve):
    large(tmp_path / "s", shards=2, count=20)
    server = serve(tmp_path / "s")
    sets = load(f"{server.url}/s-{{00..01}}.tar")
    server.shutdown()
    server.server_close()
    assert len(batches(loader(sets, workers=2))) > 0
