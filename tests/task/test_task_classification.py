"""Targets, loss and accuracy of classification."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cvtrain.aug.mixing import mix_up
from cvtrain.loss import CrossEntropy
from cvtrain.regularizer import LabelSmoothing
from cvtrain.task import Classification


def task(*regularizers, classes=4):
    return Classification(CrossEntropy(), regularizers, classes)


class Fixed(nn.Module):
    """Answers with logits of its own, whatever the picture."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits[: len(images)]


@pytest.fixture
def mixed():
    torch.manual_seed(0)
    labels, partner = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 0, 2, 1, 5, 4])
    images = torch.randn(6, 1, 2, 2)
    images, targets = mix_up(images, task().encode(labels), partner, 0.3)
    return images, targets, labels, labels[partner], Fixed(torch.randn(6, 4))


def test_encoding_gives_one_hot_float32():
    encoded = task().encode(torch.tensor([2, 0]))
    assert encoded.dtype == torch.float32
    assert encoded.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


def test_the_loss_of_a_mixed_batch_is_lambda_times_each_labels_cross_entropy(mixed):
    images, targets, a, b, model = mixed
    expected = 0.3 * F.cross_entropy(model.logits, a) + 0.7 * F.cross_entropy(model.logits, b)
    assert torch.allclose(task().losses(model, images, targets)["loss"], expected, atol=1e-6)


def test_the_accuracy_of_a_mixed_batch_counts_each_label_by_lambda(mixed):
    images, targets, a, b, model = mixed
    predicted = model.logits.argmax(1)
    expected = 0.3 * (predicted == a).float().mean() + 0.7 * (predicted == b).float().mean()
    assert 0 < float(expected) < 1
    assert torch.allclose(task().losses(model, images, targets)["acc"], expected)


def test_smoothing_changes_the_loss_and_not_the_accuracy(mixed):
    images, targets, a, b, model = mixed
    plain, smooth = task().losses(model, images, targets), task(LabelSmoothing(0.2)).losses(model, images, targets)
    expected = 0.3 * F.cross_entropy(model.logits, a, label_smoothing=0.2)
    expected += 0.7 * F.cross_entropy(model.logits, b, label_smoothing=0.2)
    assert torch.allclose(smooth["loss"], expected, atol=1e-6)
    assert not torch.allclose(smooth["loss"], plain["loss"], atol=1e-3)
    assert torch.equal(smooth["acc"], plain["acc"])


def test_regularizers_soften_one_after_the_other(mixed):
    images, targets, _, _, model = mixed
    twice = task(LabelSmoothing(0.1), LabelSmoothing(0.3)).losses(model, images, targets)["loss"]
    soft = targets.numpy().astype(np.float64)
    for epsilon in (0.1, 0.3):
        soft = soft * (1 - epsilon) + epsilon / 4
    expected = -(soft * model.logits.detach().double().log_softmax(1).numpy()).sum(1).mean()
    assert float(twice.detach()) == pytest.approx(expected, rel=1e-6)


def test_the_gradient_is_softmax_minus_target_and_the_accuracy_has_none(mixed):
    images, targets, _, _, model = mixed
    losses = task().losses(model, images, targets)
    assert not losses["acc"].requires_grad
    losses["loss"].backward()
    assert torch.allclose(model.logits.grad, (model.logits.detach().softmax(1) - targets) / 6, atol=1e-6)


def test_the_loss_of_low_precision_logits_is_computed_in_float32():
    logits, targets = torch.randn(8, 4).bfloat16(), task().encode(torch.arange(8) % 4)
    loss = CrossEntropy()(logits, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, F.cross_entropy(logits.float(), targets))


def test_evaluation_counts_every_class():
    metrics = task(classes=7).metrics(torch.device("cpu"))
    metrics.update(torch.eye(7)[[0, 6, 6]], torch.tensor([0, 6, 1]))
    assert metrics.compute()["acc"] == pytest.approx(2 / 3)
    assert metrics.matrix().shape == (7, 7)
