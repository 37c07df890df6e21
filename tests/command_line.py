"""The command line inside this process: as a user sees it, without two seconds of imports a call."""

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path

import pytest


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


def run_cvtrain(folder, *argv: str) -> Answer:
    """Run `cvtrain ARGV` in `folder`, a training without pictures unless asked; return exit code, stdout, stderr."""
    from cvtrain.cli import main

    trains = not argv or argv[0] in ("train", "-m", "-cd") or "=" in argv[0]
    if trains and not any(word.startswith(("--", "plots=", "report=")) for word in argv):
        argv = (*argv, "plots=false", "report=false")
    path, arguments = list(sys.path), sys.argv
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["cvtrain", *argv]
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as left,
        ):
            main()
    finally:
        sys.argv, sys.path[:] = arguments, path
    return Answer(int(left.value.code), out.getvalue(), err.getvalue())
