"""Signals to whole runs, in every phase: code, status, what was saved, and how long it took (RELIABILITY P2 to P5)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SERVER = Path(__file__).with_name("signalling.py")
CODES = {"SIGTERM": 143, "SIGINT": 130}
TOOK_S = 5.0
"""The slowed phase is 0.5 s of it; the rest is generous, for machines that do other things too."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, str(SERVER), str(tmp_path_factory.mktemp("signals"))],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("phase", ["train", "save", "validation"])
def test_one_signal_while_training_finishes_the_step_saves_it_and_says_so(ends, name, phase):
    end = ends[f"{name} {phase}"]
    status = end["status"]
    assert (end["code"], status["exit_code"], status["state"]) == (CODES[name], CODES[name], "stopped")
    assert end["saved"] == end["steps"] > 0  # no step is lost
    assert status["retryable"]
    assert status["checkpoint"] == "weights/last.safetensors"
    assert f"stopped by {name}; the checkpoint is written" in status["reason"]
    assert end["seconds"] < TOOK_S
    assert end["left"] == []


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("phase", ["data", "batch show", "test"])
def test_one_signal_before_or_after_training_stops_at_once(ends, name, phase):
    end = ends[f"{name} {phase}"]
    assert (end["code"], end["status"]["exit_code"], end["status"]["state"]) == (CODES[name], CODES[name], "stopped")
    assert end["saved"] == (12 if phase == "test" else -1)
    assert end["status"]["checkpoint"] == ("weights/last.safetensors" if phase == "test" else None)
    assert end["seconds"] < TOOK_S


def test_a_lost_terminal_stops_a_run_like_sigterm_but_not_one_started_with_nohup(ends):
    assert (ends["SIGHUP train"]["code"], ends["SIGHUP train"]["saved"]) == (143, 4)
    after = ends["SIGHUP after nohup"]
    assert (after["code"], after["steps"], after["status"]["state"]) == (0, 12, "done")


def test_sigusr1_saves_and_training_goes_on(ends):
    end = ends["SIGUSR1 train"]
    assert end["first"] == 4  # within the epoch of 6 steps, which would have saved at 6
    assert (end["code"], end["steps"], end["saved"]) == (0, 12, 12)


def test_a_second_signal_leaves_within_a_second_with_the_last_checkpoint(ends):
    end = ends["twice"]
    assert (end["code"], end["status"]["exit_code"], end["status"]["state"]) == (130, 130, "stopped")
    assert end["seconds"] < 1.0
    assert (end["saved"], end["steps"]) == (2, 3)
    assert "second signal" in end["status"]["reason"]


@pytest.mark.parametrize(("name", "code", "saved"), [("grace", 143, 2), ("hung data", 130, 4)])
def test_a_step_or_a_wait_that_does_not_end_is_left_after_the_grace_time(ends, name, code, saved):
    end = ends[name]
    assert (end["code"], end["status"]["exit_code"], end["saved"]) == (code, code, saved)
    assert 0.8 < end["seconds"] < 1.0 + TOOK_S
    assert "did not end within 1 s; the last checkpoint stands" in end["status"]["reason"]


@pytest.mark.parametrize(("name", "code"), [("group with workers", 143), ("group with workers in validation", 130)])
def test_a_signal_to_the_whole_group_is_the_main_processs_alone(ends, name, code):
    """Data workers that died of it would take the step that is still to be finished with them (finding 9)."""
    end = ends[name]
    assert (end["code"], end["status"]["exit_code"]) == (code, code)
    assert end["saved"] == end["steps"] >= 4
    assert end["seconds"] < TOOK_S + 5  # joining two workers


def test_a_worker_that_is_killed_while_nobody_waits_for_it_ends_the_run_with_8(ends):
    end = ends["worker killed"]
    assert (end["code"], end["status"]["exit_code"], end["status"]["state"]) == (8, 8, "failed")
    assert end["status"]["retryable"]
    assert "a data worker died" in end["status"]["reason"]
    assert end["saved"] == 4
