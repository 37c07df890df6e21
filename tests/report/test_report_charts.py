"""Drawings of a page: round scales, gaps where nothing is known, names that do not cover each other."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvtrain.report import charts
from cvtrain.report.charts import Bin, Series, line_chart, nice_ticks, short


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_evenly_spaced_and_hold_the_values(low, span):
    ticks = nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 8
    slack = 1e-6 * max(abs(low), span)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0], rtol=1e-3)


def test_equal_values_have_a_scale_too():
    for value in (0.0, 1.0, -3.5):
        ticks = nice_ticks(value, value)
        assert ticks[0] < value < ticks[-1]


def test_a_line_is_broken_where_there_is_no_value_and_says_what_it_shows():
    drawn = line_chart("a", "Loss", [Series("val", [2.0, math.nan, 1.0, 0.5], "val")], short)
    (path,) = re.findall(r'<path d="([^"]+)"', drawn)
    assert [part[0] for part in path.split(" ") if part[0].isalpha()] == ["M", "M", "L"]
    assert "val: 2 at epoch 1, 0.5 at epoch 4; lowest 0.5 at epoch 4, highest 2 at epoch 1." in drawn
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', drawn)]
    assert heights == sorted(heights)  # falling values go down the page


@pytest.mark.parametrize("values", [[], [math.nan, math.inf]])
def test_nothing_is_drawn_of_nothing(values):
    assert line_chart("a", "Loss", [Series("val", values, "val")], short) == ""


def test_one_epoch_is_a_dot_and_thousands_are_a_short_path():
    assert 'class="line val lone"' in line_chart("a", "Loss", [Series("val", [1.0], "val")], short)
    assert len(line_chart("a", "Loss", [Series("val", list(range(1, 50_000)), "val")], short)) < 20_000


def test_names_at_the_ends_of_lines_do_not_cover_each_other():
    series = [Series(f"run {i}", [1.0, 2.0 + 0.001 * i], f"c{i}") for i in range(6)]
    drawn = line_chart("a", "Loss", series, short)
    heights = sorted(float(y) for y in re.findall(r'<text class="c\d" x="[\d.]+" y="([\d.]+)"', drawn))
    assert len(heights) == 6
    assert min(np.diff(heights)) >= 12.9
    falling = [Series(f"run {i}", [2.0, 1.0], f"c{i}") for i in range(6)]
    lowest = max(
        float(y)
        for y in re.findall(r'<text class="c\d" x="[\d.]+" y="([\d.]+)"', line_chart("a", "Loss", falling, short))
    )
    assert lowest < 200  # above the numbers of the epochs


def test_the_points_of_a_reliability_diagram_stand_where_they_belong():
    drawn = charts.reliability("r", [Bin(10, 0.25, 0.5, 0.3, 0.7), Bin(30, 0.75, 1.0, 0.9, 1.0)])
    points = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert points[1][0] - points[0][0] == pytest.approx(130)
    assert points[0][1] - points[1][1] == pytest.approx(130)
    assert "10 answers that are 25\u00a0% sure are right in 50\u00a0%." in drawn
