"""Class weights, and what they do to the losses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from cvtrain.errors import ConfigError
from cvtrain.loss import BinaryCrossEntropy, CrossEntropy, class_weights
from cvtrain.loss.weights import BETA
from cvtrain.regularizer import LabelSmoothing

NAMES = ["ant", "bee", "cat"]
LABELS = np.repeat(np.arange(3), [400, 40, 4])
SPECS = ["balanced", "effective", {"ant": 1, "bee": 2.5, "cat": 30}]


def batch(count=12, classes=3, seed=0):
    torch.manual_seed(seed)
    return torch.randn(count, classes) * 2, torch.randint(0, classes, (count,))


def test_none_is_no_weight():
    assert class_weights("none", LABELS, NAMES) is None


def test_balanced_equals_scikit_learns():
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    np.testing.assert_allclose(class_weights("balanced", LABELS, NAMES).numpy(), expected, rtol=1e-6)


def test_effective_weights_fall_with_the_effective_number_of_samples():
    labels = np.repeat(np.arange(3), [60000, 3000, 7])
    weights = class_weights("effective", labels, NAMES).numpy()
    numbers = np.array([np.sum(BETA ** np.arange(n)) for n in (60000, 3000, 7)])
    np.testing.assert_allclose(weights / weights[0], numbers[0] / numbers, rtol=1e-5)
    balanced = class_weights("balanced", labels, NAMES).numpy()
    assert weights[2] / weights[0] < 0.2 * balanced[2] / balanced[0]


def test_given_weights_keep_their_ratios():
    weights = class_weights({"cat": 30, "ant": 1, "bee": 2.5}, LABELS, NAMES).numpy()
    np.testing.assert_allclose(weights / weights[0], [1, 2.5, 30], rtol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_the_mean_weight_of_the_training_pictures_is_one(spec):
    assert class_weights(spec, LABELS, NAMES).numpy()[LABELS].mean() == pytest.approx(1, rel=1e-5)


def test_numbers_as_names_may_be_given_as_numbers():
    weights = class_weights({0: 1, 1: 3}, np.array([0, 0, 1]), ["0", "1"])
    assert float(weights[1] / weights[0]) == pytest.approx(3)


def test_a_class_without_a_training_picture_gets_a_finite_weight():
    weights = class_weights("balanced", np.array([0, 0, 1]), NAMES)
    assert torch.isfinite(weights).all()
    assert weights.min() > 0


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"ant": 1, "bee": 1, "cta": 2}, ["'cta'", "did you mean 'cat'", "ant, bee, cat"]),
        ({"ant": 1}, ["leaves out 2 of 3", "bee, cat", "1 for an ordinary one"]),
    ],
)
def test_unknown_and_missing_names_are_refused_with_the_fix(spec, words):
    with pytest.raises(ConfigError) as refused:
        class_weights(spec, LABELS, NAMES)
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize("spec", SPECS)
def test_over_the_training_set_the_loss_is_torchs_weighted_cross_entropy(spec):
    weight, labels = class_weights(spec, LABELS, NAMES), torch.from_numpy(LABELS)
    logits = batch(len(LABELS))[0]
    ours = CrossEntropy(weight)(logits, F.one_hot(labels, 3).float())
    assert float(ours) == pytest.approx(float(F.cross_entropy(logits, labels, weight=weight)), rel=1e-5)


def test_a_batch_is_the_weighted_sum_over_its_pictures_divided_by_their_number():
    weight = class_weights("balanced", LABELS, NAMES)
    logits, labels = batch()
    expected = F.cross_entropy(logits, labels, weight=weight, reduction="sum") / len(labels)
    assert float(CrossEntropy(weight)(logits, F.one_hot(labels, 3).float())) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("loss", [CrossEntropy, BinaryCrossEntropy])
def test_uneven_micro_batches_weighted_by_their_share_give_the_gradient_of_the_large_batch(loss):
    weighted = loss(torch.tensor([0.3, 1.0, 9.0]))
    logits, labels = batch()
    labels[:5] = 0  # a micro-batch of one class only, where dividing by Σ weight would lose the weight
    targets = F.one_hot(labels, 3).float()
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weighted(whole, targets).backward()
    for chosen in (slice(0, 5), slice(5, 11), slice(11, 12)):
        (weighted(parts[chosen], targets[chosen]) * (len(targets[chosen]) / len(targets))).backward()
    assert torch.allclose(whole.grad, parts.grad, atol=1e-7)


def test_soft_targets_are_weighted_class_by_class():
    weight, logits = torch.tensor([0.5, 1.0, 4.0]), batch()[0]
    targets = torch.rand(12, 3).softmax(1)
    log_p = logits.double().log_softmax(1)
    expected = -(weight.double() * targets.double() * log_p).sum() / 12
    assert float(CrossEntropy(weight)(logits, targets)) == pytest.approx(float(expected), rel=1e-6)


def test_with_smoothed_labels_the_weighted_loss_is_torchs_own():
    weight = torch.tensor([0.5, 1.0, 4.0])
    logits, labels = batch()
    softened = LabelSmoothing(0.2).soften(F.one_hot(labels, 3).float())
    expected = F.cross_entropy(logits, labels, weight=weight, label_smoothing=0.2, reduction="sum") / 12
    assert float(CrossEntropy(weight)(logits, softened)) == pytest.approx(float(expected), rel=1e-6)


def test_binary_cross_entropy_is_the_mean_over_batch_and_labels():
    logits, targets = batch()[0], torch.rand(12, 3)
    p = logits.double().sigmoid().numpy()
    t, w = targets.double().numpy(), np.array([0.5, 1.0, 4.0])
    for weight, factor in ((None, 1.0), (torch.from_numpy(w).float(), w)):
        expected = -(factor * t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
        assert float(BinaryCrossEntropy(weight)(logits, targets)) == pytest.approx(expected, rel=1e-5)


def test_the_losses_of_low_precision_logits_are_computed_in_float32():
    logits, targets = batch()[0].bfloat16(), torch.rand(12, 3)
    for loss in (CrossEntropy(), BinaryCrossEntropy()):
        assert loss(logits, targets).dtype == torch.float32
        assert torch.equal(loss(logits, targets), loss(logits.float(), targets))


def test_multi_label_weights_make_presence_and_absence_of_a_label_weigh_the_same():
    labels = (np.random.default_rng(0).random((3000, 3)) < [0.6, 0.1, 0.004]).astype(np.uint8)
    present = labels.sum(0, dtype=int)
    np.testing.assert_allclose(class_weights("balanced", labels, NAMES).numpy(), (3000 - present) / present, rtol=1e-6)
    effective = np.vectorize(lambda n: np.sum(BETA ** np.arange(n)))
    np.testing.assert_allclose(
        class_weights("effective", labels, NAMES).numpy(), effective(3000 - present) / effective(present), rtol=1e-5
    )
    assert class_weights({"ant": 1, "bee": 2, "cat": 5}, labels, NAMES).tolist() == [1, 2, 5]
