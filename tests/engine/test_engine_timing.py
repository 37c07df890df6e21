"""Where the time goes: phases by the clock, a trace that opens, and nothing when it is off."""

import gzip
import json
import time

import numpy as np
import pytest
import torch
from engine_parts import CPU, make_run

from cvtrain.engine.loop import fit
from cvtrain.engine.timing import NoTimer, PhaseTimer, Profiler


def busy(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_each_phase_gets_its_time_and_the_rest_is_other():
    timer = PhaseTimer(CPU)
    for _ in range(4):
        with timer.phase("data"):
            busy(0.004)
        with timer.phase("forward"):
            busy(0.002)
        busy(0.003)
        with timer.phase("optimizer"):
            busy(0.001)
    with timer.phase("evaluate"):
        busy(0.008)
    table = timer.table()
    assert table.steps == 4
    expected = {"data": 0.004, "augment": 0, "forward": 0.002, "backward": 0, "optimizer": 0.001, "other": 0.003}
    assert table.step.keys() == expected.keys()
    for name, seconds in expected.items():  # a busy machine makes a phase longer, never shorter
        assert seconds * 0.99 <= table.step[name] < seconds + 0.01, name
    assert table.epoch["evaluate"] >= 0.008
    assert sum(table.shares(10).values()) == pytest.approx(1)


def test_a_phase_inside_another_counts_for_itself_alone():
    timer = PhaseTimer(CPU)
    with timer.phase("evaluate"):
        busy(0.002)
        with timer.phase("checkpoint"):
            busy(0.02)
    table = timer.table()
    assert table.epoch["checkpoint"] >= 0.02
    assert 0.002 <= table.epoch["evaluate"] < 0.02


def test_what_lies_before_a_reset_does_not_count():
    timer = PhaseTimer(CPU)
    with timer.phase("data"):
        busy(0.05)
        timer.reset()
    assert timer.table().step["data"] < 0.04


def test_shares_are_those_of_an_epoch_of_so_many_steps():
    timer = PhaseTimer(CPU)
    for name in ("data", "optimizer"):
        with timer.phase(name):
            busy(0.01)
    with timer.phase("evaluate"):
        busy(0.02)
    one, many = timer.table().shares(1), timer.table().shares(1000)
    assert one["evaluate"] > 0.3
    assert many["evaluate"] < 0.01


def test_a_profiled_run_ends_in_the_same_weights_and_leaves_a_trace_with_its_phases(tmp_path):
    plain = make_run(tmp_path / "plain", epochs=3)
    fit(plain)
    run = make_run(tmp_path / "profiled", epochs=3)
    run.timer = Profiler(CPU, tmp_path, run.options.epochs * run.steps_per_epoch)
    fit(run)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name]), name
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"data", "augment", "forward", "backward", "optimizer"} <= names
    table = run.timer.table()
    assert 0 < table.steps < 3 * run.steps_per_epoch, "warm-up and trace are not among them"
    assert all(value > 0 for value in table.step.values())
    assert table.epoch["evaluate"] > 0


def test_a_run_of_a_single_step_still_leaves_a_trace(tmp_path):
    run = make_run(tmp_path, epochs=1, limit_train_batches=1)
    run.timer = Profiler(CPU, tmp_path, 1)
    fit(run)
    run.timer.close()
    assert (tmp_path / "trace.json.gz").stat().st_size > 1000


def test_a_run_that_is_broken_off_while_it_is_traced_leaves_the_trace_and_may_be_closed_again(tmp_path):
    timer = Profiler(CPU, tmp_path, 4)
    with timer.phase("optimizer"):
        pass
    with pytest.raises(ValueError, match="stop"), timer.phase("forward"):
        raise ValueError("stop")
    timer.close()
    timer.close()
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        assert json.load(file)["traceEvents"]


def test_the_timer_that_measures_nothing_costs_less_than_a_microsecond_a_phase():
    timer, rounds = NoTimer(), 2000
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(rounds):
            with timer.phase("forward"):
                pass
        times.append((time.perf_counter() - start) / rounds)
    assert np.min(times) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_device_is_timed_and_nothing_waits():
    device = torch.device("cuda")
    timer = PhaseTimer(device)
    matrix = torch.rand(4096, 4096, device=device)
    torch.cuda.synchronize()
    started = time.perf_counter()
    with timer.phase("forward"):
        for _ in range(50):
            matrix = matrix @ matrix
    launched = time.perf_counter() - started
    with timer.phase("optimizer"):
        pass
    assert timer.table().step["forward"] > 2 * launched
