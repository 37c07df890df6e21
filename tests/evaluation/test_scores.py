"""Metrics of a split against scikit-learn's, and whether their intervals keep what they promise."""

import time

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from cvtrain.core.random import generator
from cvtrain.evaluation import CalibrationError
from cvtrain.evaluation.scores import (
    RESAMPLES,
    area_under_roc,
    difference,
    precision_at_positives,
    reliability,
    score,
)


def one_class(count=400, classes=6, seed=0, sure=1.5):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, count - classes)])
    logits = rng.normal(size=(count, classes)) * sure
    logits[np.arange(count), labels] += 1.6 * sure
    return labels, torch.from_numpy(logits.astype(np.float32))


def any_labels(count=300, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, classes)) < rng.uniform(0.05, 0.6, classes)).astype(np.uint8)
    logits = (rng.normal(size=(count, classes)) * 2 + 2.5 * labels - 1.5).astype(np.float32).round(1)
    return labels, torch.from_numpy(logits)


def error_by_hand(confidence, right, bins=15):
    """The expected calibration error, one answer after the other."""
    found = 0.0
    for low in np.arange(bins) / bins:
        inside = (confidence >= low) & ((confidence < low + 1 / bins) | (low + 1 / bins > 1 - 1e-9))
        found += abs(confidence[inside].sum() - right[inside].sum())
    return found / len(confidence)


def expected_one_class(labels, logits, temperature):
    present, predicted = np.unique(labels), logits.argmax(1).numpy()
    p, plain = (torch.softmax(logits / scale, 1).numpy().astype(np.float64) for scale in (temperature, 1.0))
    kinds = range(logits.shape[1])
    precision, recall, f1, _ = sk.precision_recall_fscore_support(
        labels, predicted, labels=present, average="macro", zero_division=0
    )
    areas = [sk.roc_auc_score(labels == k, p[:, k]) for k in present]
    return {
        "loss": sk.log_loss(labels, torch.softmax(logits.double(), 1).numpy(), labels=kinds),
        "acc": sk.accuracy_score(labels, predicted),
        **({"top5": sk.top_k_accuracy_score(labels, plain, k=5, labels=kinds)} if len(kinds) > 5 else {}),
        "balanced_acc": sk.recall_score(labels, predicted, labels=present, average="macro"),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "auroc": np.mean(areas),
        "ece": error_by_hand(p.max(1), predicted == labels),
        "ece_uncalibrated": error_by_hand(plain.max(1), predicted == labels),
    }


@pytest.mark.parametrize("classes", [2, 6, 37])
def test_every_value_equals_scikit_learns_on_the_same_answers(classes):
    labels, logits = one_class(classes=classes)
    values = score(labels, logits, 1.7).values
    assert values == pytest.approx(expected_one_class(labels, logits, 1.7), rel=1e-6)
    assert list(values) == list(expected_one_class(labels, logits, 1.7))
    p = torch.softmax(logits / 1.7, 1).numpy()
    whole = sk.roc_auc_score(labels, p, multi_class="ovr") if classes > 2 else sk.roc_auc_score(labels, p[:, 1])
    assert values["auroc"] == pytest.approx(whole, rel=1e-6)
    assert abs(values["ece"] - values["ece_uncalibrated"]) > 0.01


def test_classes_that_no_picture_has_do_not_count():
    labels, logits = one_class(classes=6)
    labels[labels == 4] = 0
    assert score(labels, logits).values == pytest.approx(expected_one_class(labels, logits, 1.0), rel=1e-6)
    assert np.isnan(score(np.zeros(20, np.int64), logits[:20]).values["auroc"])


def test_every_value_of_several_labels_equals_scikit_learns():
    labels, logits = any_labels()
    labels[:, 2] = 0
    there = labels.any(0)
    given, p = (logits >= 0).numpy(), logits.double().sigmoid().numpy()
    calibrated = (logits / 0.6).sigmoid().double().numpy()
    precision, recall, f1, _ = sk.precision_recall_fscore_support(
        labels[:, there], given[:, there], average="macro", zero_division=0
    )
    expected = {
        "loss": np.mean([sk.log_loss(labels[:, k], p[:, k], labels=[0, 1]) for k in range(5)]),
        "acc": sk.accuracy_score(labels, given),
        "map": sk.average_precision_score(labels[:, there], logits.numpy()[:, there]),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "f1_micro": sk.f1_score(labels, given, average="micro"),
        "hamming": sk.hamming_loss(labels, given),
        "auroc": sk.roc_auc_score(labels[:, there], logits.numpy()[:, there]),
        "ece": error_by_hand(calibrated.ravel(), labels.ravel()),
        "ece_uncalibrated": error_by_hand(logits.sigmoid().double().numpy().ravel(), labels.ravel()),
    }
    found = score(labels, logits, 0.6)
    assert found.values == pytest.approx(expected, rel=1e-6)
    assert list(found.values) == list(expected)
    assert set(found.intervals) == set(expected)


@pytest.mark.parametrize(
    ("ours", "reference"),
    [(area_under_roc, sk.roc_auc_score), (precision_at_positives, sk.average_precision_score)],
)
def test_what_moves_a_ranking_is_the_slope_of_scikit_learns_value_in_the_weight_of_a_picture(ours, reference):
    labels, logits = any_labels(60, 2)
    positive, scores = labels[:, 0].astype(bool), logits[:, 0].double().numpy().round()
    assert len(np.unique(scores)) < 20, "many scores are equal"
    value, influence = ours(scores, positive)
    assert value == pytest.approx(reference(positive, scores))
    assert influence.sum() == pytest.approx(0, abs=1e-12)
    for i in range(60):
        more, less = (
            reference(positive, scores, sample_weight=1 + step * (np.arange(60) == i)) for step in (1e-4, -1e-4)
        )
        assert influence[i] == pytest.approx((more - less) / 2e-4, abs=1e-6)


def redrawn(count):
    """The pictures of each resample, as `scores` says that it draws them when one part holds all."""
    assert count * RESAMPLES <= 2**19
    return generator("bootstrap", count).integers(0, count, (count, RESAMPLES)).T


def test_a_draw_is_scikit_learns_value_on_the_pictures_drawn():
    labels, logits = one_class(200, 4)
    found, predicted = score(labels, logits, 1.3), logits.argmax(1).numpy()
    p = torch.softmax(logits.double(), 1).numpy()
    areas = []
    for k, chosen in enumerate(redrawn(200)[:150]):
        y, answers = labels[chosen], predicted[chosen]
        areas.append(sk.roc_auc_score(y, torch.softmax(logits / 1.3, 1).numpy()[chosen], multi_class="ovr"))
        if k < 20:
            expected = {
                "loss": sk.log_loss(y, p[chosen], labels=range(4)),
                "balanced_acc": sk.balanced_accuracy_score(y, answers),
                "precision": sk.precision_score(y, answers, average="macro"),
                "f1": sk.f1_score(y, answers, average="macro"),
                "ece_uncalibrated": error_by_hand(p[chosen].max(1), y == answers),
            }
            assert {name: found.draws[name][k] for name in expected} == pytest.approx(expected, rel=1e-6)
    linear = found.draws["auroc"][:150]
    assert np.corrcoef(linear, areas)[0, 1] > 0.98
    assert np.std(linear) == pytest.approx(np.std(areas), rel=0.1)


def test_intervals_hold_the_true_value_as_often_as_they_say():
    """150 test sets of 250 pictures from one population, whose true metrics a set of 60,000 tells.

    At the temperature 1 / 1.6 its probabilities are right: percentiles of draws would never hold so small an error.
    """
    truth = expected_one_class(*one_class(60_000, 4, seed=1, sure=1.0), 1 / 1.6)
    assert truth["ece"] < 0.01 < 0.1 < truth["ece_uncalibrated"]
    rounds = 150
    held = dict.fromkeys(truth, 0)
    widths = {name: [] for name in truth}
    for seed in range(rounds):
        found = score(*one_class(250, 4, seed=100 + seed, sure=1.0), 1 / 1.6).intervals
        for name, (low, high) in found.items():
            held[name] += low <= truth[name] <= high
            widths[name].append(high - low)
    for name, count in held.items():
        assert (0.88 if "ece" in name else 0.90) * rounds <= count < rounds, (name, count)
        assert np.mean(widths[name]) < (0.25 if name == "loss" else 0.15), name


def test_a_difference_is_paired_and_much_narrower_than_two_intervals():
    labels, logits = one_class(500)
    changed = logits + torch.from_numpy(np.random.default_rng(5).normal(size=logits.shape) * 0.3).float()
    one, other = score(labels, logits), score(labels, changed)
    for name in ("acc", "f1", "auroc", "loss"):
        found = difference(other, one, name)
        assert found.value == pytest.approx(other.values[name] - one.values[name])
        assert found.low <= found.value <= found.high
        low, high = one.intervals[name]
        assert found.high - found.low < 0.75 * (high - low), name
    assert difference(one, one, "f1") is None
    assert difference(one, one, "acc").low < 0 < difference(one, one, "acc").high


def test_all_right_leaves_an_interval_only_where_one_can_be_known():
    labels = np.arange(60) % 3
    found = score(labels, 20 * torch.eye(3)[labels])
    assert found.values["f1"] == found.values["auroc"] == 1
    assert found.intervals["acc"][0] == pytest.approx(60 / (60 + 1.959964**2))  # Wilson's bound at all of 60
    assert not {"f1", "auroc", "balanced_acc"} & set(found.intervals)


def test_logits_that_are_not_numbers_crash_nothing():
    labels, logits = one_class(50)
    found = score(labels, logits * np.nan)
    assert np.isnan(found.values["loss"])
    assert np.isnan(found.values["auroc"])
    assert "loss" not in found.intervals
    assert set(score(any_labels()[0], any_labels()[1] * np.nan).values) >= {"map", "hamming"}


def test_the_reliability_of_each_bin_is_that_of_its_answers_and_agrees_with_the_error():
    labels, logits = one_class(300)
    probabilities = torch.softmax(logits, 1)
    bins = reliability(probabilities, labels)
    confidence, right = probabilities.max(1).values.numpy(), (logits.argmax(1).numpy() == labels)
    for k in range(15):
        inside = (confidence >= k / 15) & (confidence < (k + 1) / 15)
        assert bins.count[k] == inside.sum()
        if inside.any():
            assert bins.accuracy[k] == pytest.approx(right[inside].mean())
            assert bins.confidence[k] == pytest.approx(confidence[inside].mean(), rel=1e-6)
        else:
            assert np.isnan(bins.accuracy[k])
    streamed = CalibrationError()
    streamed.add(probabilities, torch.from_numpy(labels))
    assert np.nansum(bins.count * abs(bins.accuracy - bins.confidence)) / 300 == pytest.approx(streamed.compute())
    assert score(labels, logits).values["ece"] == pytest.approx(streamed.compute())


def test_ten_thousand_pictures_of_ten_classes_take_less_than_two_seconds():
    labels, logits = one_class(10_000, 10)
    start = time.process_time()
    found = score(labels, logits, 1.2)
    assert time.process_time() - start < 2
    assert all(len(draws) == RESAMPLES for draws in found.draws.values())
