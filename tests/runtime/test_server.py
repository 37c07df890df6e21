"""Artifacts in child processes: their answers, their errors, and how they end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from artifact_files import described, write_linear

from cvtrain.command.worker import load
from cvtrain.core.artifact import Artifact
from cvtrain.core.types import Preprocess
from cvtrain.errors import ConfigError, CvtrainError, WeightsError, WorkerError
from cvtrain.runtime.server import Worker
from cvtrain.runtime.session import Session

PREP = Preprocess(4, 6, 1, (0.3,), (0.4,))
RNG = np.random.default_rng(0)
WEIGHT, BIAS = RNG.normal(size=(3, 16)), RNG.normal(size=3)
IMAGES = RNG.integers(0, 256, (5, 1, 6, 6), dtype=np.uint8)


@pytest.fixture
def artifact(tmp_path):
    return write_linear(tmp_path / "a.onnx", WEIGHT, BIAS, described("abc", PREP, temperature="1.5"))


@pytest.fixture
def start():
    """Start children that end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda artifact: stack.enter_context(contextlib.closing(Worker(artifact, 1)))


def gone(pid, seconds=5.0):
    """Whether a process ends within the time; a zombie has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_a_child_answers_to_the_bit_as_this_process_and_knows_no_torch_and_no_launch(
    artifact, start, monkeypatch, tmp_path, capfd
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('a module of the folder it is started in')")
    worker, here = start(artifact), Session(load("onnxruntime", artifact.path, 1), artifact.path)
    assert (worker.metadata, worker.embedded) == (here.metadata, False)
    assert worker.metadata["temperature"] == "1.5"
    answers = worker.run(IMAGES)
    assert answers.dtype == np.float32
    assert np.array_equal(answers, here.run(IMAGES))
    times = worker.time(2, 7)
    assert len(times) == 7 and min(times) > 0
    assert "libtorch" not in Path(f"/proc/{worker.pid}/maps").read_text()
    assert b"WORLD_SIZE" not in Path(f"/proc/{worker.pid}/environ").read_bytes()
    worker.close()
    worker.close()
    assert gone(worker.pid, 0.1)
    assert capfd.readouterr() == ("", "")


def test_memory_is_that_of_the_file_and_not_of_the_libraries(artifact, start, tmp_path):
    big = Preprocess(1000, 1000, 1, (0.0,), (1.0,))
    large = write_linear(tmp_path / "b.onnx", np.ones((10, 10**6)), np.ones(10), described("abcdefghij", big))
    small, more = start(artifact), start(large)
    assert 0 < small.memory() < 20
    assert 40 < more.memory() < 200
    more.time(40, 1)  # its input alone takes 160 MB, as bytes 40
    assert more.memory() > 200


def test_a_killed_child_is_told_quickly_with_the_names_of_artifact_and_signal(artifact, start):
    worker = start(artifact)
    worker.run(IMAGES)
    os.kill(worker.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"'onnx'.*a\.onnx in onnxruntime has died \(killed by SIGKILL\)"):
        worker.run(IMAGES)
    assert time.monotonic() - began < 2


def test_a_child_that_is_killed_while_it_loads_is_told(artifact, start):
    worker = start(artifact)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="killed by SIGKILL"):
        worker.memory()


def test_the_last_words_of_a_dying_library_are_told(artifact, start, monkeypatch, tmp_path):
    (tmp_path / "onnxruntime.py").write_text(
        "import os, sys; print('no such instruction', file=sys.stderr, flush=True); os.abort()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WorkerError, match=r"killed by SIGABRT; it said: no such instruction"):
        start(artifact).run(IMAGES)


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (lambda a: a.path.unlink(), WeightsError, "no file at"),
        (lambda a: a.path.write_bytes(b"\x08"), WeightsError, "cannot load"),
        (lambda a: write_linear(a.path, WEIGHT, BIAS, described("ab", PREP)), WeightsError, r"\(1, 3\), not \(1, 2\)"),
        (lambda a: write_linear(a.path, WEIGHT[:, :4], BIAS, described("abc", PREP)), WeightsError, "cannot load"),
        (lambda a: Artifact(a.name, a.path, "onnx", 0, 0), ConfigError, "unknown runtime"),
    ],
    ids=["missing", "damaged", "classes", "input", "runtime"],
)
def test_what_a_child_cannot_start_is_told_with_the_class_it_has_here(artifact, start, damage, kind, words, capfd):
    changed = damage(artifact)
    with pytest.raises(kind, match=words) as caught:
        start(changed if isinstance(changed, Artifact) else artifact).run(IMAGES)
    assert str(caught.value).startswith("artifact 'onnx': ")
    assert capfd.readouterr() == ("", "")


def test_a_call_that_fails_leaves_the_child_for_the_next_one(artifact, start):
    worker = start(artifact)
    with pytest.raises(CvtrainError, match=r"a\.onnx fails in onnxruntime"):
        worker.run(np.zeros((1, 2, 6, 6), dtype=np.uint8))
    assert worker.run(IMAGES).shape == (5, 3)


PARENT = """
import sys
from pathlib import Path
from types import SimpleNamespace  # an Artifact would import torch
from cvtrain.runtime.server import Worker
worker = Worker(SimpleNamespace(name="onnx", path=Path(sys.argv[1]), runtime="onnxruntime"), 1)
worker.metadata
print(worker.pid, flush=True)
try:
    while True:
        worker.time(1, 1000)
except KeyboardInterrupt:
    pass
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["kill", "term", "int"])
def test_a_child_ends_without_a_word_with_a_parent_that_is_ended_in_the_middle_of_a_call(artifact, number):
    argv = [sys.executable, "-c", PARENT, str(artifact.path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parent = subprocess.Popen(argv, start_new_session=True, **pipes)
    child = int(parent.stdout.readline())
    try:
        time.sleep(0.1)
        os.killpg(parent.pid, number)
        assert gone(child, 15)
        assert parent.communicate(timeout=15) == ("", "")
    finally:
        parent.kill()
