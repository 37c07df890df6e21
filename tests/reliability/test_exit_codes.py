"""Every exit code from a shell script under `set -e`, and the status file beside it (RELIABILITY 2.1, R13)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPECTED = {
    "done": 0, "finished": 0, "bug": 1, "config": 2, "data": 3, "weights": 4, "diverged": 5, "storage": 6, "memory": 7,
    "worker": 8, "locked": 9, "sigint": 130, "sigterm": 143,
}  # fmt: skip
RETRY = {"worker", "sigint", "sigterm"}
TEXT = {
    "bug": "ZeroDivisionError", "config": "did you mean", "data": "/nowhere", "weights": "torn.safetensors",
    "diverged": "optimizer.lr", "storage": "output_dir", "memory": "Lower batch_size", "locked": "in use",
    "finished": "already finished",
}  # fmt: skip


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    done = subprocess.run(
        ["bash", str(Path(__file__).with_name("exit_codes.sh"))],
        cwd=folder, capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, "CVTRAIN": f"{sys.executable} -m cvtrain", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, {name: int(code) for code, name in (line.split() for line in done.stdout.splitlines())}


@pytest.mark.slow
def test_a_script_under_set_e_sees_every_code_of_the_contract(script):
    assert script[1] == EXPECTED


@pytest.mark.slow
def test_each_failure_says_what_to_do_in_a_few_lines_and_without_a_traceback(script):
    folder, _ = script
    for name, text in TEXT.items():
        error = (folder / f"{name}.err").read_text()
        assert text in error, name
        assert "Traceback" not in error, name


@pytest.mark.slow
def test_the_status_file_agrees_with_the_code(script):
    folder, codes = script
    told = {"bug": "failed", "diverged": "failed", "memory": "failed", "done": "done"}
    for name, state in told.items():
        run = Path((folder / f"{name}.out").read_text().strip().splitlines()[-1])
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["exit_code"], status["retryable"]) == (state, codes[name], False), name
    for name, place, state in (("worker", "worker", "failed"), ("sigterm", "stopped", "stopped")):
        (path,) = folder.glob(f"{place}/*/*/status.json")
        status = json.loads(path.read_text())
        assert (status["state"], status["exit_code"]) == (state, codes[name])
        assert status["retryable"]
        assert status["checkpoint"] == "weights/last.safetensors"
