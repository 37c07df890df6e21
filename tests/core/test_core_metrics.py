"""Classification metrics against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from cvtrain.core.metrics import ClassificationMetrics, MultilabelMetrics, average_precision, class_counts, per_class

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


def answers(classes, count=300, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random((count, classes)) < rng.uniform(0.02, 0.6, classes)
    logits = rng.normal(size=(count, classes)).astype(np.float32) * 2 + 2.5 * labels - 1.5
    return torch.from_numpy(logits.astype(np.float32)), torch.from_numpy(labels.astype(np.uint8))


def multilabel(logits, labels, sizes=64):
    metrics = MultilabelMetrics(logits.shape[1], CPU)
    for x, y in zip(logits.split(sizes), labels.split(sizes), strict=True):
        metrics.update(x, y)
    return metrics


def expected_multilabel(logits, labels):
    given, present = (logits >= 0).numpy(), labels.numpy().any(0)
    truth, p = labels.numpy(), logits.double().sigmoid().numpy()
    return {
        "loss": np.mean([sk.log_loss(truth[:, k], p[:, k], labels=[0, 1]) for k in range(truth.shape[1])]),
        "acc": sk.accuracy_score(truth, given),
        "map": sk.average_precision_score(truth[:, present], logits.numpy()[:, present], average="macro"),
        "f1": sk.f1_score(truth[:, present], given[:, present], average="macro", zero_division=0),
        "f1_micro": sk.f1_score(truth, given, average="micro"),
        "hamming": sk.hamming_loss(truth, given),
    }


@pytest.mark.parametrize("classes", [2, 5, 37])
def test_every_multi_label_value_equals_scikit_learns(classes):
    logits, labels = answers(classes)
    assert multilabel(logits, labels).compute() == pytest.approx(expected_multilabel(logits, labels), rel=1e-6)
    assert multilabel(logits, labels, 7).compute() == pytest.approx(multilabel(logits, labels).compute(), rel=1e-9)


def test_equal_scores_are_one_threshold_of_average_precision():
    logits, labels = answers(5)
    coarse = logits.round()
    expected = sk.average_precision_score(labels.numpy(), coarse.numpy(), average=None)
    np.testing.assert_allclose(average_precision(coarse, labels.bool()), expected, rtol=1e-6)


def test_labels_that_no_picture_has_do_not_count_in_the_multi_label_means():
    logits, labels = answers(5)
    labels[:, 3] = 0
    metrics = multilabel(logits, labels)
    assert metrics.compute() == pytest.approx(expected_multilabel(logits, labels), rel=1e-6)
    assert metrics.by_class()["average_precision"][3] == 0


def test_the_table_of_the_labels_equals_scikit_learns():
    logits, labels = answers(6)
    labels[:, 2] = 0
    table = multilabel(logits, labels).by_class()
    given = (logits >= 0).numpy()
    expected = sk.precision_recall_fscore_support(labels.numpy(), given, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        np.testing.assert_allclose(table[name], values, atol=1e-12)
    np.testing.assert_array_equal(table["hits"], sk.multilabel_confusion_matrix(labels.numpy(), given)[:, 1, 1])


def test_both_kinds_of_metrics_count_the_pictures_that_are_right():
    logits, labels = predictions(10)
    right, total = measured(logits, labels, 10, 64).right()
    assert (right, total) == (int((logits.argmax(1) == labels).sum()), 400)
    logits, labels = answers(3)
    right, total = multilabel(logits, labels).right()
    assert right / total == sk.accuracy_score(labels.numpy(), (logits >= 0).numpy())
    assert total == 300


def test_nothing_measured_gives_zeros_and_logits_that_are_not_numbers_no_crash():
    assert set(MultilabelMetrics(3, CPU).compute().values()) == {0.0}
    logits, labels = answers(3)
    values = multilabel(logits * float("nan"), labels).compute()
    assert np.isnan(values["loss"])
    assert values["f1_micro"] == 0


def test_class_counts_are_those_of_numbers_and_of_several_labels():
    assert class_counts(np.array([2, 0, 2]), 4).tolist() == [1, 0, 2, 0]
    many = np.ones((300, 2), dtype=np.uint8)
    assert class_counts(many, 2).tolist() == [300, 300]
