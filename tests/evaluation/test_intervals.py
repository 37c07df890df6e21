import numpy as np
import pytest

from cvtrain.errors import CvtrainError
from cvtrain.evaluation import paired_bootstrap, paired_difference, wilson


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # z² = 3.841459: for 0 of n the upper bound is z²/n / (1 + z²/n) = 3.841459 / 13.841459.
        (0, 10, 0.0, 0.2775327),
        (10, 10, 0.7224673, 1.0),
        # Wilson's textbook values for 8 of 10 and 50 of 100.
        (8, 10, 0.4901625, 0.9433178),
        (50, 100, 0.4038315, 0.5961685),
    ],
)
def test_wilson_agrees_with_values_computed_by_hand(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=1e-6)


def test_wilson_knows_nothing_without_samples():
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_narrows_with_a_smaller_z():
    wide, narrow = wilson(80, 100), wilson(80, 100, z=1.0)
    assert wide[0] < narrow[0] < 0.8 < narrow[1] < wide[1]


@pytest.mark.parametrize(("correct", "total"), [(-1, 10), (11, 10)])
def test_wilson_refuses_impossible_counts(correct, total):
    with pytest.raises(CvtrainError, match="impossible"):
        wilson(correct, total)


def test_wilson_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for truth, total in [(0.5, 30), (0.9, 60), (0.98, 200)]:
        bounds = [wilson(int(k), total) for k in rng.binomial(total, truth, 4000)]
        assert 0.93 < np.mean([low <= truth <= high for low, high in bounds]) < 0.98


@pytest.mark.parametrize(
    ("only_a", "only_b", "total", "expected"),
    [
        # p = 11/102 and 5/102; centre 6/102; variance (16/102 - (6/102)²) / 102 = 0.001503949.
        (10, 4, 100, (0.06, -0.0171855, 0.1348326)),
        # p = 1/12 each; variance (2/12) / 12.
        (0, 0, 10, (0.0, -0.2309840, 0.2309840)),
        # p = 1/12 and 11/12; centre -10/12; variance (1 - 100/144) / 12; the lower bound is cut at -1.
        (0, 10, 10, (-1.0, -1.0, -0.5205796)),
    ],
)
def test_the_paired_difference_agrees_with_values_computed_by_hand(only_a, only_b, total, expected):
    assert paired_difference(only_a, only_b, total) == pytest.approx(expected, abs=1e-6)


def test_the_paired_difference_changes_sign_when_the_models_are_swapped():
    delta, low, high = paired_difference(7, 2, 50)
    assert paired_difference(2, 7, 50) == pytest.approx((-delta, -high, -low))


@pytest.mark.parametrize("total", [1, 10, 10_000_000])
def test_the_paired_difference_never_has_zero_width(total):
    _, low, high = paired_difference(0, 0, total)
    assert low < 0 < high


@pytest.mark.parametrize("counts", [(1, 1, 1), (-1, 0, 5), (0, -1, 5), (0, 0, 0)])
def test_the_paired_difference_refuses_impossible_counts(counts):
    with pytest.raises(CvtrainError, match="impossible"):
        paired_difference(*counts)


def test_the_paired_difference_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for p_a, p_b, total in [(0.05, 0.03, 200), (0.2, 0.05, 50), (0.01, 0.01, 360)]:
        counts = rng.multinomial(total, [p_a, p_b, 1 - p_a - p_b], 4000)
        bounds = [paired_difference(int(a), int(b), total) for a, b, _ in counts]
        assert 0.935 < np.mean([low <= p_a - p_b <= high for _, low, high in bounds]) < 0.999


def test_the_bootstrap_is_the_one_that_draws_the_samples_themselves():
    rng, only_a, only_b, total = np.random.default_rng(0), 12, 5, 200
    outcomes = np.array([1] * only_a + [-1] * only_b + [0] * (total - only_a - only_b))
    drawn = rng.choice(outcomes, (20_000, total)).mean(1)
    delta, low, high = paired_bootstrap(only_a, only_b, total)
    assert delta == pytest.approx((only_a - only_b) / total)
    assert (low, high) == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))), abs=1.1 / total)


def test_the_bootstrap_of_the_same_counts_is_the_same():
    assert paired_bootstrap(12, 5, 200) == paired_bootstrap(12, 5, 200)


@pytest.mark.parametrize("counts", [(0, 0, 360), (1, 0, 1), (5, 0, 5)])
def test_where_the_bootstrap_knows_nothing_the_adjusted_wald_interval_stands(counts):
    assert paired_bootstrap(*counts) == paired_difference(*counts)
    assert paired_bootstrap(*counts)[1] < paired_bootstrap(*counts)[2]


@pytest.mark.parametrize("counts", [(1, 1, 1), (-1, 0, 5), (0, -1, 5), (0, 0, 0)])
def test_the_bootstrap_refuses_impossible_counts(counts):
    with pytest.raises(CvtrainError, match="impossible"):
        paired_bootstrap(*counts)


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for p_a, p_b, total in [(0.05, 0.03, 400), (0.1, 0.05, 300)]:
        counts = rng.multinomial(total, [p_a, p_b, 1 - p_a - p_b], 300)
        bounds = [paired_bootstrap(int(a), int(b), total, draws=1000) for a, b, _ in counts]
        assert 0.9 < np.mean([low <= p_a - p_b <= high for _, low, high in bounds]) < 0.99
