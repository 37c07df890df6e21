"""Data workers that are killed, hang or raise, and shared memory that is too small: each really happens."""

import logging
import multiprocessing
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch

from cvtrain.core.types import DataSets, Preprocess
from cvtrain.data import ArraySource, Loader, LoaderConfig, shared_memory
from cvtrain.data import loader as loading
from cvtrain.data.shared_memory import workers_that_fit
from cvtrain.errors import DataError, WorkerError

pytestmark = pytest.mark.usefixtures("one_thread")


class Files:
    """A source that is not an array; `before` runs in the worker."""

    def __init__(self, before=lambda indices: None, count=64, side=2):
        images = torch.zeros(count, 1, side, side, dtype=torch.uint8)
        self.source = ArraySource(images, np.arange(count, dtype=np.int64) % 2, [str(i) for i in range(count)])
        self.labels, self.names, self.before = self.source.labels, self.source.names, before

    def __len__(self):
        return len(self.source)

    def read(self, indices):
        self.before(indices)
        return self.source.read(indices)


def loader(source, workers=2, batch_size=4):
    preprocess = Preprocess(2, 2, 1, (0.5,), (0.5,))
    sets = DataSets("files", ["a", "b"], preprocess, source, source, source)
    return Loader(sets, LoaderConfig(batch_size, 0, torch.device("cpu"), mode="host", workers=workers))


def test_a_worker_killed_from_outside_is_a_worker_error_of_three_lines_with_code_8():
    batches = loader(Files(lambda indices: time.sleep(0.05))).train_batches(0)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="a data worker died or hangs") as failed:
        for _ in batches:
            pass
    assert failed.value.exit_code == 8
    assert failed.value.retryable
    assert len(str(failed.value).splitlines()) <= 3
    assert "workers=0" in str(failed.value)


def test_a_worker_that_hangs_is_a_worker_error_when_the_time_is_up(monkeypatch):
    monkeypatch.setattr(loading, "WORKER_TIMEOUT", 1.0)
    batches = loader(Files(lambda indices: time.sleep(60)), workers=1).train_batches(0)
    started = time.monotonic()
    with pytest.raises(WorkerError, match="timed out after 1"):
        next(batches)
    assert time.monotonic() - started < 30
    for child in multiprocessing.active_children():  # the first SIGTERM is taken for a scheduler's; exit sends another
        child.terminate()
        child.join(10)
        assert not child.is_alive()


def unreadable(indices):
    raise DataError("/photos/a/3.jpg: image file is truncated")


def test_a_picture_that_cannot_be_read_is_one_line_with_its_path_and_code_3():
    with pytest.raises(DataError) as failed:
        next(loader(Files(unreadable)).train_batches(0))
    assert str(failed.value) == "/photos/a/3.jpg: image file is truncated"
    assert failed.value.exit_code == 3


@pytest.fixture
def small_memory(tmp_path):
    """A file system of 8 MB, as a container's /dev/shm may be."""
    folder = tmp_path / "shm"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], check=False)
    if done.returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_in_a_small_shared_memory_fewer_workers_are_used_and_the_run_says_so(small_memory, caplog):
    caplog.set_level(logging.WARNING, logger="cvtrain")
    assert workers_that_fit(8, 1_000_000, small_memory) == 2
    assert len(caplog.messages) == 1
    assert "workers=8 need 32 MB" in caplog.messages[0]
    assert "2 are used" in caplog.messages[0]
    (small_memory / "taken").write_bytes(bytes(7_000_000))
    assert workers_that_fit(8, 1_000_000, small_memory) == 0, "what others have taken is not free"


def test_a_loader_reads_with_the_workers_that_fit(small_memory, monkeypatch):
    (small_memory / "taken").write_bytes(bytes(8_000_000))
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", small_memory)
    small = loader(Files(count=64), workers=2, batch_size=40_000)
    assert small.config.workers == 0
    assert len(list(small.train_batches(0))) == 1
    assert not multiprocessing.active_children()
    monkeypatch.undo()
    assert loader(Files(), workers=2).config.workers == 2


def test_where_there_is_room_or_no_such_folder_all_workers_are_used_without_a_word(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="cvtrain")
    assert workers_that_fit(4, 1000, tmp_path) == 4
    assert workers_that_fit(4, 10**15, tmp_path / "missing") == 4
    assert caplog.messages == []


def test_a_batch_too_large_for_the_shared_memory_is_read_without_workers(tmp_path, caplog):
    free = os.statvfs(tmp_path)
    assert workers_that_fit(4, free.f_bavail * free.f_frsize, tmp_path) == 0
    assert "0 are used" in caplog.messages[0]
