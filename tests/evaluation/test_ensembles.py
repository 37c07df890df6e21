import itertools
import math

import numpy as np
import pytest
import torch

from cvtrain.errors import CvtrainError
from cvtrain.evaluation.ensembles import average, compare, fit_weights, vote


def said(seed, samples=40, classes=3):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(classes), samples).astype(np.float32))


def loss(shares, members, labels):
    """Mean negative log-likelihood of members given as lists, one sample and one label after the other."""
    logs = []
    for i, label in enumerate(labels):
        mixed = [
            sum(s * row for s, row in zip(shares, column, strict=True))
            for column in zip(*(p[i] for p in members), strict=True)
        ]
        if np.ndim(label) == 0:
            logs.append(math.log(mixed[label]))
        else:
            logs += [math.log(q if y else 1 - q) for q, y in zip(mixed, label, strict=True)]
    return -sum(logs) / len(logs)


def test_the_weighted_mean_is_that_of_numpy():
    members, shares = [said(0), said(1), said(2)], np.array([0.5, 0.3, 0.2])
    expected = np.average(np.stack([one.double().numpy() for one in members]), axis=0, weights=shares)
    np.testing.assert_allclose(average(members, shares).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_vote_goes_to_the_majority_and_its_ties_to_the_likelier_mean(count):
    members = [said(seed, samples=200) for seed in range(count)]
    voted = vote(members, multilabel=False)
    ties = 0
    for i in range(200):
        ballots = [int(one[i].argmax()) for one in members]
        most = max(ballots.count(k) for k in range(3))
        winners = [k for k in range(3) if ballots.count(k) == most]
        ties += len(winners) > 1
        assert int(voted[i].argmax()) == max(winners, key=lambda k: sum(float(one[i, k]) for one in members))
    assert ties > 5
    torch.testing.assert_close(voted.sum(1), torch.ones(200, dtype=torch.float64))
    assert float(voted.min()) > 0


@pytest.mark.parametrize("count", [2, 3, 4])
def test_of_several_labels_each_is_voted_on_by_itself(count):
    members = [torch.rand(100, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    given = vote(members, multilabel=True) >= 0.5
    ties = 0
    for i, k in itertools.product(range(100), range(4)):
        yes = sum(float(one[i, k]) >= 0.5 for one in members)
        ties += 2 * yes == count
        mean = sum(float(one[i, k]) for one in members) / count
        assert bool(given[i, k]) == (yes > count / 2 or (2 * yes == count and mean >= 0.5))
    assert (ties > 20) == (count % 2 == 0)


@pytest.mark.parametrize("multilabel", [False, True])
def test_fitted_weights_are_those_that_a_search_of_the_whole_simplex_finds(multilabel):
    rng = np.random.default_rng(3)
    truth = rng.dirichlet(np.full(3, 0.5), 60)
    labels = (truth > 0.4).astype(np.int64) if multilabel else (truth.cumsum(1) < rng.random((60, 1))).sum(1)
    # Three that know the truth more or less, each blurred in its own way.
    members = [
        torch.from_numpy((1 - blur) * truth + blur * rng.dirichlet(np.ones(3), 60)).float() for blur in (0.3, 0.5, 0.95)
    ]
    steps = np.arange(0, 41) / 40
    grid = [(a, b, 1 - a - b) for a, b in itertools.product(steps, steps) if a + b <= 1 + 1e-9]
    lists = [one.tolist() for one in members]
    best = min(grid, key=lambda shares: loss(shares, lists, labels))
    found = fit_weights(members, labels)
    assert found.sum() == pytest.approx(1)
    assert (found >= 0).all()
    np.testing.assert_allclose(found, best, atol=0.03)
    assert loss(found, lists, labels) <= loss(best, lists, labels) + 1e-9
    assert max(found) > 0.5


def test_a_member_that_only_guesses_gets_no_weight():
    labels = np.random.default_rng(0).integers(0, 3, 200)
    knowing = 0.7 * torch.eye(3)[labels] + 0.1
    wrong = knowing[:, [1, 2, 0]]
    np.testing.assert_allclose(fit_weights([knowing, wrong, wrong], labels), [1, 0, 0], atol=1e-6)


def test_weights_are_the_same_where_nothing_is_to_be_learnt():
    labels = np.zeros(40, np.int64)
    for members in ([said(0)] * 2, [said(0), said(0) * np.nan], [said(0)[:0], said(1)[:0]]):
        np.testing.assert_allclose(fit_weights(members, labels[: len(members[0])]), [0.5, 0.5])


def test_an_error_of_which_all_are_sure_does_not_keep_the_rest_from_being_weighed():
    labels = np.zeros(50, np.int64)
    good, blurred = torch.full((50, 2), 0.5), torch.full((50, 2), 0.5)
    good[:, 0], good[:, 1] = 0.9, 0.1
    good[7] = blurred[7] = torch.tensor([0.0, 1.0])
    np.testing.assert_allclose(fit_weights([blurred, good], labels), [0, 1], atol=1e-6)


def test_who_is_sure_and_errs_once_in_fifty_is_taken_with_a_grain_of_the_others():
    labels = np.zeros(50, np.int64)
    even, sure = torch.full((50, 2), 0.5), torch.eye(2)[torch.tensor([0] * 49 + [1])]
    # Where 49 log(1 - w / 2) + log(w / 2) is largest.
    np.testing.assert_allclose(fit_weights([even, sure], labels), [0.04, 0.96], atol=1e-4)


def test_a_comparison_says_which_is_better_only_when_the_pictures_can_tell():
    right = np.ones(200, dtype=bool)
    half = np.arange(200) % 2 == 0
    once = np.arange(200) != 7
    assert compare(right, half).verdict == "better"
    assert compare(half, right).verdict == "worse"
    assert compare(right, right).verdict == compare(right, once).verdict == "not distinguishable"
    difference = compare(right, half)
    assert difference.value == 0.5
    assert difference.low < 0.5 < difference.high
    assert str(difference).startswith("+50.00 points [95 %: +4")
    with pytest.raises(CvtrainError):
        compare(right[:0], right[:0])
