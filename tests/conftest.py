"""What every test has."""

import atexit
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import absl.logging
import pytest
from command_line import run_cvtrain

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which a run ignores it, may have started the tests
signal.signal(signal.SIGINT, signal.default_int_handler)  # and a shell in the background, this
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cvtrain-tests-")  # what a run remembers is not the user's
# TensorBoard's logging closes the stream that it began with, which is pytest's, when Hydra sets up logging in a test
# that has put another in the place of standard error.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Run files with slow tests first: one that came last would keep one process busy and leave the other idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def cvtrain(tmp_path, monkeypatch):
    """Run `cvtrain ARGV` in an empty folder; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield lambda *argv: run_cvtrain(Path.cwd(), *argv)
    sys.path[:] = path


@pytest.fixture
def one_thread():
    """Tiny tensors on two busy cores are quickest, and to the bit the same, on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
