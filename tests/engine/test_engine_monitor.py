"""Which epoch is best, and when patience is over."""

import math

import pytest

from cvtrain.engine.monitor import Monitor


def watch(values, mode="max", patience=None, min_delta=0.0):
    monitor = Monitor("val/x", mode, patience, min_delta)
    return monitor, [monitor.update({"val/x": v, "other": i}, i) for i, v in enumerate(values)]


def test_of_equal_epochs_the_later_is_the_best_and_patience_goes_on_counting():
    monitor, best = watch([0.5, 0.7, 0.7, 0.7], patience=2)
    assert best == [True, True, True, True]
    assert (monitor.best, monitor.best_epoch, monitor.best_row) == (0.7, 3, {"val/x": 0.7, "other": 3})
    assert monitor.bad_epochs == 2
    assert monitor.exhausted


def test_an_improvement_starts_patience_anew():
    monitor, best = watch([0.5, 0.4, 0.6, 0.5], patience=2)
    assert best == [True, False, True, False]
    assert (monitor.bad_epochs, monitor.exhausted) == (1, False)


def test_without_patience_a_run_is_never_exhausted():
    monitor, _ = watch([0.5] + [0.1] * 1000)
    assert monitor.bad_epochs == 1000
    assert not monitor.exhausted


def test_in_min_mode_smaller_is_better():
    monitor, best = watch([1.0, 0.8, 0.9, 0.8, 0.7], mode="min")
    assert best == [True, True, False, True, True]
    assert (monitor.best, monitor.best_epoch) == (0.7, 4)


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_never_the_best_and_counts_against_patience(mode, bad):
    monitor, best = watch([bad, 0.5, bad], mode, patience=1)
    assert best == [False, True, False]
    assert (monitor.best, monitor.best_epoch, monitor.bad_epochs) == (0.5, 1, 1)
    assert monitor.exhausted


def test_a_gain_within_min_delta_is_the_best_but_does_not_feed_patience():
    monitor, best = watch([0.50, 0.505, 0.503, 0.52], min_delta=0.01)
    assert best == [True, True, False, True]
    assert monitor.bad_epochs == 0
    monitor, best = watch([0.50, 0.505, 0.506], min_delta=0.01)
    assert (best, monitor.bad_epochs, monitor.best_epoch) == ([True, True, True], 2, 2)


def test_small_gains_that_add_up_to_more_than_min_delta_are_an_improvement():
    monitor, best = watch([0.500, 0.506, 0.512, 0.518, 0.524], patience=3, min_delta=0.01)
    assert best == [True] * 5
    assert monitor.bad_epochs == 0  # 0.524 is 0.012 above the last improvement, 0.512
    assert not monitor.exhausted


def test_a_monitor_goes_on_from_the_history():
    before = [0.5, 0.6, 0.55]
    one, _ = watch(before, patience=3, min_delta=0.02)
    two = Monitor("val/x", "max", 3, 0.02)
    two.replay([{"val/x": value} for value in before])
    for epoch, value in enumerate([0.61, 0.62, 0.63, 0.59], start=3):
        assert one.update({"val/x": value}, epoch) == two.update({"val/x": value}, epoch)
        assert vars(one) == vars(two)
        assert one.exhausted == two.exhausted
