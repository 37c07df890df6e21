"""Classification metrics against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from cvtrain.core.metrics import ClassificationMetrics, per_class

CPU = torch.device("cpu")


def predictions(classes, count=400, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.concatenate(
        [np.arange(classes), rng.choice(classes, count - classes, p=rng.dirichlet(np.ones(classes)))]
    )
    logits = rng.normal(size=(count, classes)).astype(np.float32) * 2
    logits[np.arange(count), labels] += 1.5
    return torch.from_numpy(logits), torch.from_numpy(labels)


def measured(logits, labels, classes, sizes):
    metrics = ClassificationMetrics(classes, CPU)
    for x, y in zip(logits.split(sizes), labels.split(sizes), strict=True):
        metrics.update(x, y)
    return metrics


@pytest.mark.parametrize("classes", [2, 5, 6, 10, 37])
def test_every_value_equals_scikit_learns(classes):
    logits, labels = predictions(classes)
    metrics = measured(logits, labels, classes, 64)
    predicted, probabilities = logits.argmax(1), logits.double().softmax(1).numpy()
    expected = {
        "loss": sk.log_loss(labels, probabilities, labels=range(classes)),
        "acc": sk.accuracy_score(labels, predicted),
        "balanced_acc": sk.balanced_accuracy_score(labels, predicted),
        "f1": sk.f1_score(labels, predicted, average="macro"),
    }
    if classes > 5:
        expected["top5"] = sk.top_k_accuracy_score(labels, probabilities, k=5, labels=range(classes))
    assert metrics.compute() == pytest.approx(expected, rel=1e-6)
    np.testing.assert_array_equal(metrics.matrix(), sk.confusion_matrix(labels, predicted))


def test_per_class_values_equal_scikit_learns_also_where_a_class_is_never_predicted_or_never_there():
    labels, predicted = np.array([0, 0, 1, 1, 1, 3]), np.array([0, 1, 1, 1, 4, 0])
    matrix = sk.confusion_matrix(labels, predicted, labels=range(5))
    table = per_class(matrix)
    expected = sk.precision_recall_fscore_support(labels, predicted, labels=range(5), zero_division=0)
    for name, values in zip(("precision", "recall", "f1"), expected, strict=False):
        np.testing.assert_allclose(table[name], values, atol=1e-12)


def test_classes_without_a_sample_do_not_count_in_the_means():
    labels, predicted = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 1])
    metrics = ClassificationMetrics(4, CPU)
    metrics.update(torch.nn.functional.one_hot(predicted, 4).float(), labels)
    values = metrics.compute()
    assert values["balanced_acc"] == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    assert values["f1"] == pytest.approx(sk.f1_score(labels, predicted, labels=[0, 1], average="macro"))


@pytest.mark.parametrize("sizes", [1, 7, 399, 400])
def test_the_batches_do_not_matter(sizes):
    logits, labels = predictions(10)
    assert measured(logits, labels, 10, sizes).compute() == pytest.approx(
        measured(logits, labels, 10, 64).compute(), rel=1e-6
    )


def test_bfloat16_logits_are_measured_in_float32():
    logits, labels = predictions(10)
    low = logits.bfloat16()
    assert measured(low, labels, 10, 64).compute() == measured(low.float(), labels, 10, 64).compute()


def test_nothing_measured_gives_zeros():
    assert ClassificationMetrics(3, CPU).compute() == {"loss": 0.0, "acc": 0.0, "balanced_acc": 0.0, "f1": 0.0}
