"""kill -9 in the middle of saves, in real processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SERVER = Path(__file__).with_name("engine_killing.py")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, str(SERVER), str(tmp_path_factory.mktemp("kill"))],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_kills_cover_every_operation_of_an_ordinary_save_and_of_one_that_is_the_best(campaign):
    assert (campaign["total"], campaign["best_epoch"]) == (9, 2)
    points = campaign["points"]
    assert len(points) == 18
    assert all(point["before"] == 4 for point in points)
    assert all(point["codes"] == [-9, -9] for point in points)
    first = [point["steps"][0] for point in points]
    assert sorted(first) == first
    assert set(first) == {4, 5, 6}


def test_two_kills_at_the_same_operation_of_a_save_lose_no_step_that_was_saved(campaign):
    lost = {
        p["operation"]: p["steps"]
        for p in campaign["points"]
        if not all(isinstance(s, int) and s >= 4 for s in p["steps"])
    }
    assert lost == {}


def test_a_run_that_was_killed_at_any_operation_ends_as_the_uninterrupted_one_to_the_bit(campaign):
    assert [point["operation"] for point in campaign["points"] if not point["run_same"]] == []


def test_a_kill_at_any_operation_leaves_the_best_checkpoint_of_the_uninterrupted_run(campaign):
    assert [point["operation"] for point in campaign["points"] if not point["best_same"]] == []


def test_twenty_kills_at_random_moments_lose_nothing_and_change_nothing(campaign):
    result = campaign["random"]
    assert result["killed"] >= 15
    steps = result["steps"]
    assert all(isinstance(step, int) for step in steps), result
    assert sorted(steps) == steps
    assert len(set(steps)) >= 15  # each lost at most the save that was being written and the step after it
    assert result["run_same"], result
    assert result["best_same"], result
    assert result["left"] == []
