import dataclasses

import numpy as np
import pytest

from cvtrain.evaluation import Latency, measure
from cvtrain.evaluation.latency import LEAST_RUNS, MAX_WINDOWS, TURN, warm_up


@dataclasses.dataclass
class Clockwork:
    """An artifact that takes the time it is told to, and writes down who was asked for what."""

    name: str
    calls: list
    milliseconds: object = 1.0

    def time(self, batch, runs):
        self.calls.append((self.name, batch, runs))
        pace = self.milliseconds
        return [pace(len(self.calls)) if callable(pace) else pace] * runs


def test_artifacts_are_timed_in_short_turns_behind_their_warm_ups():
    calls = []
    found = measure([Clockwork("a", calls), Clockwork("b", calls, 2.0)], batch=3, runs=12)
    assert [(each.batch, each.milliseconds) for each in found] == [(3, (1.0,) * 12), (3, (2.0,) * 12)]
    turns = [(name, batch, runs) for name, batch, runs in calls][-6:]
    assert turns == [(name, 3, runs) for runs in (TURN, TURN, 2) for name in "ab"]
    assert [name for name, _, _ in calls[:-6]] == ["a", "a", "b", "b"]


def test_a_warm_up_ends_when_two_windows_agree():
    cooling = Clockwork("a", [], lambda call: 100 / call)  # 1/20 and 1/21 differ by less than 5 %
    assert warm_up(cooling, 1, 10.0) == pytest.approx(100 / 21)
    assert len(cooling.calls) == 21


def test_a_warm_up_that_never_settles_ends_by_its_windows_or_by_its_time():
    jumping = Clockwork("a", [], lambda call: 1.0 + call % 2)
    warm_up(jumping, 1, 10.0)
    assert len(jumping.calls) == MAX_WINDOWS + 1
    slow = Clockwork("a", [], lambda call: 1000.0 * (1 + call % 2))
    warm_up(slow, 1, 5.0)
    assert len(slow.calls) < 5


def test_a_slow_artifact_gets_fewer_runs_but_never_too_few():
    calls = []
    found = measure([Clockwork("a", calls, 100.0), Clockwork("b", calls, 5000.0)], batch=1, runs=60, seconds=2.0)
    assert [len(each.milliseconds) for each in found] == [20, LEAST_RUNS]
    assert len(measure([Clockwork("a", calls, 5000.0)], batch=1, runs=2, seconds=1.0)[0].milliseconds) == 2


def test_a_latency_is_told_as_numpy_does():
    times = np.random.default_rng(0).lognormal(size=101)
    latency = Latency(8, tuple(times))
    quarter, half, rest, late = np.percentile(times, (25, 50, 75, 95))
    assert (latency.p50, latency.p95, latency.iqr) == pytest.approx((half, late, rest - quarter))
    assert latency.throughput == pytest.approx(8000 / np.median(times))
