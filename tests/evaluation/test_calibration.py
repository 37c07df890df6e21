import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from cvtrain.evaluation import CalibrationError, fit_temperature, to_probabilities
from cvtrain.evaluation.calibration import to_logits

RNG = np.random.default_rng(0)


def sampled(count=20_000, classes=5):
    """Honest logits, and labels drawn by their probabilities."""
    logits = torch.from_numpy(RNG.normal(size=(count, classes)) * 2)
    return logits, torch.from_numpy((logits.softmax(1).cumsum(1).numpy() < RNG.random((count, 1))).sum(1))


@pytest.mark.parametrize("true", [0.4, 1.0, 2.5])
def test_the_temperature_that_spoilt_the_probabilities_is_found_again(true):
    logits, labels = sampled()
    assert fit_temperature((logits * true).float(), labels, multilabel=False) == pytest.approx(true, rel=0.03)
    several = torch.from_numpy(RNG.normal(size=(20_000, 3)))
    present = torch.from_numpy(RNG.random(several.shape)) < several.sigmoid()
    assert fit_temperature(several * true, present.byte(), multilabel=True) == pytest.approx(true, rel=0.05)


def test_the_temperature_is_the_one_where_the_slope_of_the_likelihood_is_zero():
    logits, labels = sampled(300)
    scores, chosen = 3 * logits.numpy(), labels.numpy()

    def slope(beta):  # of the negative log-likelihood over 1 / temperature: expected minus given score
        powers = np.exp(beta * scores)
        return ((powers / powers.sum(1, keepdims=True) * scores).sum(1) - scores[range(300), chosen]).mean()

    found = fit_temperature(logits * 3, labels, multilabel=False)
    assert found == pytest.approx(1 / brentq(slope, 0.05, 5.0), rel=1e-4)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
        (torch.tensor([[float("nan"), 1.0]]), torch.tensor([1])),
        (torch.eye(4) * 9, torch.arange(4)),
        (torch.eye(4), torch.arange(4)),
        (torch.eye(4), torch.arange(4).roll(1)),
        (torch.zeros(4, 4), torch.arange(4)),
    ],
    ids=["nothing", "nan", "all_right_and_sure", "all_right", "all_wrong", "no_difference"],
)
def test_what_cannot_be_fitted_stays_at_one(logits, labels):
    assert fit_temperature(logits, labels, multilabel=False) == 1.0


@pytest.mark.parametrize("multilabel", [False, True])
def test_logits_come_back_from_probabilities_up_to_a_constant(multilabel):
    logits = torch.from_numpy(RNG.normal(size=(50, 4)) * 3)
    back = to_logits(to_probabilities(logits, 1.7, multilabel), 1.7, multilabel)
    shift = (back - logits)[:, :1]
    assert torch.allclose(back, logits + shift)
    assert not multilabel or shift.abs().max() < 1e-9
    sure = to_logits(torch.tensor([[1.0, 0.0]]), 1.0, multilabel)
    assert bool(sure.isfinite().all()) and sure[0, 0] > sure[0, 1]


def test_the_calibration_error_of_two_bins_is_the_one_computed_by_hand():
    error = CalibrationError()
    # 0.9, 0.9 of which one is right; 0.6 which is right.
    error.add(torch.tensor([[0.9, 0.1], [0.1, 0.9]]), torch.tensor([0, 0]))
    error.add(torch.tensor([[0.6, 0.4]]), torch.tensor([0]))
    assert error.compute() == pytest.approx(2 / 3 * abs(0.9 - 0.5) + 1 / 3 * abs(0.6 - 1.0))


def test_the_calibration_error_of_sure_and_right_answers_is_zero_and_of_nothing_nan():
    error = CalibrationError()
    assert error.compute() != error.compute()
    error.add(torch.eye(3), torch.arange(3))
    assert error.compute() == 0
    error.add(torch.full((1, 3), float("nan")), torch.zeros(1, dtype=torch.int64))
    assert error.compute() != error.compute()


@pytest.mark.slow
@pytest.mark.parametrize("multilabel", [False, True])
def test_the_calibration_error_is_the_one_of_torchmetrics(multilabel):
    functions = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = sampled(5000)
    if multilabel:
        labels = (torch.from_numpy(RNG.random(logits.shape)) < 0.4).long()
    probabilities, error = to_probabilities(logits * 2, 1.3, multilabel), CalibrationError()
    for part, given in zip(probabilities.split(999), labels.split(999), strict=True):
        error.add(part, given)
    if multilabel:
        expected = functions.binary_calibration_error(probabilities.flatten(), labels.flatten(), n_bins=15)
    else:
        expected = functions.multiclass_calibration_error(probabilities, labels, num_classes=5, n_bins=15)
    assert error.compute() == pytest.approx(float(expected), abs=1e-6)
