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
from cvtrain.task import Classification, Multilabel

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


def weights_for(kind, values):
    """Weights of presence `values` for either kind of task."""
    values = torch.tensor(values)
    return values if kind is Classification else torch.stack((torch.ones_like(values), values), -1)


def losses_of(logits, targets, weights=None, regularizers=(), kind=Classification):
    loss = CrossEntropy() if kind is Classification else BinaryCrossEntropy()
    task = kind(loss, regularizers, logits.shape[1], weights)
    return task.losses(lambda images: images, logits, targets)["loss"]


def one_hot(labels):
    return F.one_hot(labels, 3).float()


@pytest.mark.parametrize("spec", SPECS)
def test_over_the_training_set_the_loss_is_torchs_weighted_cross_entropy(spec):
    weights, labels = class_weights(spec, LABELS, NAMES), torch.from_numpy(LABELS)
    logits = batch(len(LABELS))[0]
    expected = F.cross_entropy(logits, labels, weight=weights)
    assert float(losses_of(logits, one_hot(labels), weights)) == pytest.approx(float(expected), rel=1e-5)


def test_a_batch_is_the_weighted_sum_over_its_pictures_divided_by_their_number():
    weights = class_weights("balanced", LABELS, NAMES)
    logits, labels = batch()
    expected = F.cross_entropy(logits, labels, weight=weights, reduction="sum") / len(labels)
    assert float(losses_of(logits, one_hot(labels), weights)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kind", [Classification, Multilabel])
def test_uneven_micro_batches_weighted_by_their_share_give_the_gradient_of_the_large_batch(kind):
    weights = weights_for(kind, [0.3, 1.0, 9.0])
    logits, labels = batch()
    labels[:5] = 0  # a micro-batch of one class only, where dividing by the sum of the weights would lose them
    targets = one_hot(labels)
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses_of(whole, targets, weights, [LabelSmoothing(0.1)], kind).backward()
    for chosen in (slice(0, 5), slice(5, 11), slice(11, 12)):
        loss = losses_of(parts[chosen], targets[chosen], weights, [LabelSmoothing(0.1)], kind)
        (loss * (len(targets[chosen]) / len(targets))).backward()
    assert torch.allclose(whole.grad, parts.grad, atol=1e-7)


def test_weights_of_one_change_nothing():
    logits, labels = batch()
    for kind in (Classification, Multilabel):
        plain, weighted = (
            losses_of(logits, one_hot(labels), w, [LabelSmoothing(0.1)], kind)
            for w in (None, weights_for(kind, [1.0, 1.0, 1.0]))
        )
        assert float(plain) == pytest.approx(float(weighted), rel=1e-6)


def test_the_parts_of_a_mixed_picture_are_weighted_each_by_its_class():
    weights, logits = torch.tensor([0.5, 1.0, 4.0]), batch()[0]
    targets = torch.rand(12, 3).softmax(1)
    expected = -(weights.double() * targets.double() * logits.double().log_softmax(1)).sum() / 12
    assert float(losses_of(logits, targets, weights)) == pytest.approx(float(expected), rel=1e-6)


def test_a_smoothed_picture_keeps_the_weight_of_its_own_class():
    weights = torch.tensor([0.5, 1.0, 400.0])
    logits, labels = batch()
    each = F.cross_entropy(logits, labels, label_smoothing=0.2, reduction="none")
    expected = (weights[labels] * each).mean()
    smoothed = losses_of(logits, one_hot(labels), weights, [LabelSmoothing(0.2)])
    assert float(smoothed) == pytest.approx(float(expected), rel=1e-6)


def test_the_best_answer_to_a_smoothed_frequent_picture_is_still_its_own_class():
    logits = torch.zeros(1, 3, requires_grad=True)
    for kind, target in ((Classification, [[1.0, 0, 0]]), (Multilabel, [[0.0, 0, 0]])):
        loss = losses_of(
            logits, torch.tensor(target), weights_for(kind, [0.5, 1.0, 400.0]), [LabelSmoothing(0.1)], kind
        )
        gradient = torch.autograd.grad(loss, logits)[0]
        assert gradient[0, 2] > 0  # a step makes the rare class less likely


def test_binary_cross_entropy_is_the_mean_over_batch_and_labels():
    logits, targets = batch()[0], torch.rand(12, 3)
    p, t = logits.double().sigmoid().numpy(), targets.double().numpy()
    expected = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    assert float(losses_of(logits, targets, kind=Multilabel)) == pytest.approx(expected, rel=1e-5)


def test_weights_of_presence_are_torchs_pos_weight_also_of_mixed_targets():
    logits, targets = batch()[0], torch.rand(12, 3)
    expected = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=torch.tensor([0.5, 1.0, 4.0]))
    weighted = losses_of(logits, targets, weights_for(Multilabel, [0.5, 1.0, 4.0]), kind=Multilabel)
    assert float(weighted) == pytest.approx(float(expected), rel=1e-5)


def test_the_losses_of_low_precision_logits_are_computed_in_float32():
    logits, targets = batch()[0].bfloat16(), torch.rand(12, 3)
    for loss, weight in ((CrossEntropy(), torch.rand(12)), (BinaryCrossEntropy(), torch.rand(12, 3))):
        for extra in ((), (weight,)):
            assert loss(logits, targets, *extra).dtype == torch.float32
            assert torch.equal(loss(logits, targets, *extra), loss(logits.float(), targets, *extra))


def several():
    return (np.random.default_rng(0).random((3000, 3)) < [0.6, 0.1, 0.004]).astype(np.uint8)


def test_of_several_labels_each_is_weighted_as_a_problem_of_two_classes():
    labels = several()
    balanced = class_weights("balanced", labels, NAMES).numpy()
    effective = class_weights("effective", labels, NAMES).numpy()
    for k in range(3):
        expected = compute_class_weight("balanced", classes=np.arange(2), y=labels[:, k])
        np.testing.assert_allclose(balanced[k], expected, rtol=1e-6)
        numbers = [np.sum(BETA ** np.arange(n)) for n in np.bincount(labels[:, k])]
        assert effective[k, 1] / effective[k, 0] == pytest.approx(numbers[0] / numbers[1], rel=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_the_mean_weight_of_each_of_several_labels_is_one(spec):
    labels = several()
    weights = class_weights(spec, labels, NAMES).numpy()
    np.testing.assert_allclose(weights[np.arange(3), labels].mean(0, dtype=float), 1, rtol=1e-5)
    if isinstance(spec, dict):
        np.testing.assert_allclose(weights[:, 1] / weights[:, 0], list(spec.values()), rtol=1e-5)
