"""`torchrun --nproc-per-node 2 -m cvtrain`: who writes, and how status.json tells each end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TORCHRUN = Path(sys.executable).with_name("torchrun")
QUICK = ("model=simple_cnn", "device=cpu", "compression=none", "export=none", "workers=0", "logger=none",
         "plots=false", "report=false", "json=true")  # fmt: skip
TIMEOUT_S = 240

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not TORCHRUN.exists(), reason="torchrun is not beside Python")]


class Launch:
    """Two processes of one run below `folder`."""

    def __init__(self, folder, *overrides, flags=()):
        self.folder = folder
        self.process = subprocess.Popen(
            [str(TORCHRUN), "--nproc-per-node", "2", *flags, "-m", "cvtrain", *QUICK, *overrides],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip

    def kill(self, rank, number):
        """Send a signal to one process once there is a checkpoint."""
        until = time.monotonic() + TIMEOUT_S
        while not list(self.folder.glob("outputs/*/*/weights/last.safetensors")):
            assert time.monotonic() < until
            assert self.process.poll() is None
            time.sleep(0.1)
        os.kill(self._rank(rank), number)

    def _rank(self, rank):
        answer = subprocess.run(
            ["ps", "--ppid", str(self.process.pid), "-o", "pid="], capture_output=True, text=True, check=True
        )
        for pid in answer.stdout.split():
            if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
                return int(pid)
        raise AssertionError(answer.stdout)

    def end(self):
        """Wait; return torchrun's exit code, the lines of its output, its errors and the run's status."""
        try:
            out, err = self.process.communicate(timeout=TIMEOUT_S)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        folders = list(self.folder.glob("outputs/*/*"))
        assert len(folders) == 1, (folders, err)
        return self.process.returncode, out.splitlines(), err, json.loads((folders[0] / "status.json").read_text())


def test_two_processes_train_in_one_folder_and_print_one_line(tmp_path):
    code, out, err, status = Launch(tmp_path, "epochs=2").end()
    assert (code, status["state"], status["exit_code"]) == (0, "done", 0), err
    assert len(out) == 1
    metrics = json.loads(out[0])["metrics"]
    assert metrics["test/acc"] > 0.5
    assert "processes: 2" in err
    assert err.count("device: cpu") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_with_its_name_and_code_8(tmp_path, rank):
    launch = Launch(tmp_path, "epochs=400", "save_every_steps=5")
    launch.kill(rank, signal.SIGKILL)
    began = time.monotonic()
    code, out, err, status = launch.end()
    assert time.monotonic() - began < 60
    assert code == 1  # torchrun's, whatever happened
    assert (status["state"], status["exit_code"], status["retryable"]) == ("failed", 8, True)
    assert status["reason"].startswith(f"rank {rank} (process ")
    assert [json.loads(line)["exit_code"] for line in out] == [8]
    assert err.count(f"cvtrain: rank {rank} (process") == 1


def test_sigterm_to_one_process_is_a_clean_stop_of_both(tmp_path):
    launch = Launch(tmp_path, "epochs=400", "save_every_steps=5")
    launch.kill(1, signal.SIGTERM)
    _, out, err, status = launch.end()
    assert (status["state"], status["exit_code"], status["retryable"]) == ("stopped", 143, True), err
    assert [json.loads(line)["exit_code"] for line in out] == [143]


def test_max_restarts_goes_on_by_itself_in_the_same_folder(tmp_path):
    launch = Launch(tmp_path, "epochs=4", "save_every_steps=3", flags=("--max-restarts", "1"))
    launch.kill(1, signal.SIGKILL)
    code, _, err, status = launch.end()
    assert (code, status["state"], status["resume_level"]) == (0, "done", "bit-exact"), err
    assert "resume: goes on after epoch" in err


def test_an_error_of_the_first_process_ends_the_second(tmp_path):
    code, out, err, status = Launch(tmp_path, "data=folder", "data.root=/nowhere").end()
    assert (code, status["state"], status["exit_code"]) == (1, "failed", 3), err
    assert len(out) == 1
    assert err.count("cvtrain: data=folder") == 1
