"""Training in several real processes (gloo), against one process and against a run that was not interrupted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cvtrain.engine.state import TrainState

SERVER = Path(__file__).with_name("distributed_campaign.py")
ROUNDING = 1e-6  # weights are of size 0.1 to 1; two processes add their gradients in another order


def campaign(folder, *plan):
    done = subprocess.run(
        [sys.executable, str(SERVER), str(folder), *plan], capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    plan = ("same_steps:2", "evaluation:2", "stopped_and_resumed:2", "diverging:2", "failing:2", "shares:3", "alone")
    return campaign(tmp_path_factory.mktemp("two"), *plan)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    plan = ("unfreezing:2", "resized:2", "equal_states:3", "stopped_and_resumed:3", "dying:3", "alone", "until_step_4")
    plan += ("unfreezing_resumed:2", "unfreezing_resumed:3")
    return campaign(tmp_path_factory.mktemp("more"), *plan, "other_number:2")


def distance(one, other):
    return max(abs(a - b) for a, b in zip(one["weights"], other["weights"], strict=True))


def test_values_parts_and_decisions_are_the_same_in_every_process(two):
    assert two["shares:3"] == 3 * [
        {"shared": 40, "average": [[1.0, 1.0], [1.0, 1.0]], "gathered": [10, 20, 21], "largest": [2.0, 0.0]}
    ]


def test_two_processes_take_the_steps_of_one_also_with_accumulation_and_an_odd_last_batch(two):
    alone, (first, second) = two["alone"]["same_steps"], two["same_steps:2"]
    assert first["weights"] == second["weights"]
    assert distance(first, alone) < ROUNDING
    assert first["images"] == alone["images"] == 2 * 21
    assert first["history"] == second["history"]
    for ours, theirs in zip(first["history"], alone["history"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_the_metrics_of_two_processes_are_those_of_one(two):
    alone, (first, second) = two["alone"]["evaluation"], two["evaluation:2"]
    assert first == second
    assert first["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)
    assert {k: v for k, v in first["metrics"].items() if k != "loss"} == {
        k: v for k, v in alone["metrics"].items() if k != "loss"
    }
    for name in ("logits", "limited"):
        assert len(first[name]) == len(alone[name]) == {"logits": 13, "limited": 8}[name]
        assert [x for row in first[name] for x in row] == pytest.approx(
            [x for row in alone[name] for x in row], abs=1e-6
        )


def check_resume(results):
    for result in results:
        assert result["code"] == 143
        assert result["stopped_at"] in (4, 5)  # the others hear of it at the end of the next step at the latest
        assert result["restored"][1] == result["stopped_at"]
        assert result["same"]
        assert result["history_same"]
        assert result["written"] == ["best.safetensors", "last.previous.safetensors", "last.safetensors"]
    assert len({result["stopped_at"] for result in results}) == 1


def test_sigterm_to_one_process_stops_both_after_the_same_step_and_the_resume_is_exact_to_the_bit(two):
    check_resume(two["stopped_and_resumed:2"])


def test_a_loss_that_is_infinite_in_one_process_stops_both_before_it_counts(two):
    assert two["diverging:2"] == 2 * [{"step": 3, "finite": True, "saved": True}]


def test_an_error_of_one_process_is_that_of_all_and_says_whose_it_was(two):
    first, second = two["failing:2"]
    assert (first["type"], first["code"]) == (second["type"], second["code"]) == ("DataError", 3)
    assert first["text"] == f"rank 1: {second['text']}"


@pytest.mark.slow
def test_three_processes_resume_exactly_to_the_bit(more):
    check_resume(more["stopped_and_resumed:3"])


@pytest.mark.slow
def test_weights_statistics_moments_and_averages_are_equal_in_all_processes_after_every_step(more):
    states = [result["states"] for result in more["equal_states:3"]]
    assert states[0] == states[1] == states[2]
    assert len(set(states[0])) == len(states[0]) == 6


@pytest.mark.slow
def test_parameters_that_are_unfrozen_later_train_as_in_one_process(more):
    for result in more["unfreezing:2"]:
        assert result["moved"] == more["alone"]["unfreezing"]["moved"] == [["2"], ["1", "2"], ["0", "1", "2"]]
        assert distance(result, more["alone"]["unfreezing"]) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_unfreezing_that_is_interrupted_within_a_phase_goes_on_exactly_to_the_bit(more, world):
    results = more[f"unfreezing_resumed:{world}"]
    for result in results:
        assert result["code"] == 143
        assert result["moved"] == [["2"], ["1", "2"], ["0", "1", "2"]]  # batch norm's statistics among them
        assert result["began"][0] == 1
        assert result["began"][1] in (4, 5)
        assert result["same"]
        assert result["average_same"]
    assert len({result["state"] for result in results}) == 1


@pytest.mark.slow
def test_pictures_that_grow_do_so_in_two_processes_as_in_one(more):
    assert all(distance(result, more["alone"]["resized"]) < ROUNDING for result in more["resized:2"])


@pytest.mark.slow
def test_two_processes_go_on_from_the_sample_at_which_one_has_left(more):
    for result in more["other_number:2"]:
        assert result["began"] == [4, 8]
        assert distance(result, more["alone"]["whole"]) < ROUNDING
        for ours, theirs in zip(result["history"], more["alone"]["whole"]["history"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
def test_the_death_of_one_process_is_told_by_name_within_a_minute(more):
    *survivors, dead = more["dying:3"]
    assert dead is None
    assert [result["speaker"] for result in survivors] == [True, False]
    for result in survivors:
        assert (result["type"], result["code"]) == ("WorkerError", 8)
        assert result["text"].startswith("rank 2 (process ")
        assert result["seconds"] < 60


def test_one_process_takes_over_the_sums_of_two():
    state = TrainState.new(torch.device("cpu"))
    state.load_sums(torch.tensor([[8.0, 2.0, 4.0, 4.0, 3.0], [10.0, 4.0, 5.0, 5.0, 3.0]]))
    assert state.totals() == [18.0, 6.0, 9.0, 9.0, 3.0]
    assert state.means() == {"train/loss": 2.0, "train/acc": 6 / 9, "train/grad_norm": 1.0}
