"""The command line inside this process: as a user sees it, without two seconds of imports a call."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which a run ignores it, may have started the tests
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cvtrain-tests-")  # what a run remembers is not the user's


@dataclasses.dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.out.strip().splitlines()[-1]

    @property
    def json(self) -> dict:
        return json.loads(self.last)

    @property
    def folder(self) -> Path:
        return Path(self.json["run"] if self.last.startswith("{") else self.last)


@pytest.fixture
def cvtrain(tmp_path, monkeypatch):
    """Run `cvtrain ARGV` in an empty folder; returns exit code, stdout, stderr."""
    from cvtrain.cli import main

    monkeypatch.chdir(tmp_path)
    path = list(sys.path)

    def run(*argv: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["cvtrain", *argv])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
            main()
        return Answer(int(left.value.code), out.getvalue(), err.getvalue())

    yield run
    sys.path[:] = path


@pytest.fixture
def one_thread():
    """Tiny tensors on two busy cores are quickest, and to the bit the same, on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
