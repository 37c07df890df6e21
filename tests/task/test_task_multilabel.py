"""Targets, loss and accuracy of multi-label classification."""

import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as sk
from torch import nn

from cvtrain.aug.mixing import mix_up
from cvtrain.loss import BinaryCrossEntropy
from cvtrain.regularizer import LabelSmoothing, StochasticDepth
from cvtrain.task import Multilabel


class Fixed(nn.Module):
    """Answers with logits of its own, whatever the picture."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits[: len(images)]


def task(*regularizers, classes=4):
    return Multilabel(BinaryCrossEntropy(), regularizers, classes)


@pytest.fixture
def labels():
    return torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]], dtype=torch.uint8)


@pytest.fixture
def model(labels):
    torch.manual_seed(0)
    logits = (labels.float() * 2 - 1) * torch.rand(4, 4)
    logits[3, 0] = 0.7  # one wrong label makes the whole answer wrong
    return Fixed(logits)


IMAGES = torch.zeros(4, 1, 2, 2)


def test_targets_become_float32(labels):
    assert task().encode(labels).dtype == torch.float32
    assert torch.equal(task().encode(labels), labels.float())


def test_a_label_is_given_from_a_probability_of_one_half_on():
    assert task().decide(torch.tensor([[-0.1, 0.0, 3.0]])).tolist() == [[0, 1, 1]]


def test_the_loss_is_the_mean_binary_cross_entropy_and_the_accuracy_is_exact_match(labels, model):
    losses = task().losses(model, IMAGES, labels.float())
    expected = F.binary_cross_entropy(model.logits.sigmoid(), labels.float())
    assert float(losses["loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(losses["acc"]) == sk.accuracy_score(labels, task().decide(model.logits)) == 0.75
    assert losses["loss"].requires_grad
    assert not losses["acc"].requires_grad


def test_the_loss_of_a_mixed_batch_is_lambda_times_that_of_each_part(labels, model):
    partner = torch.tensor([1, 2, 3, 0])
    images, targets = mix_up(IMAGES, task().encode(labels), partner, 0.3)
    own, other = (task().losses(model, images, x.float())["loss"] for x in (labels, labels[partner]))
    mixed = task().losses(model, images, targets)
    assert torch.allclose(mixed["loss"], 0.3 * own + 0.7 * other, atol=1e-6)
    assert float(mixed["acc"]) == sk.accuracy_score(labels[partner], task().decide(model.logits))


def test_smoothing_moves_every_label_towards_one_half(labels, model):
    plain, smooth = (t.losses(model, IMAGES, labels.float()) for t in (task(), task(LabelSmoothing(0.2))))
    expected = F.binary_cross_entropy_with_logits(model.logits, labels.float() * 0.8 + 0.1)
    assert torch.allclose(smooth["loss"], expected, atol=1e-6)
    assert not torch.allclose(smooth["loss"], plain["loss"], atol=1e-3)
    assert torch.equal(smooth["acc"], plain["acc"])


def test_a_regularizer_of_the_model_leaves_the_targets_alone(labels, model):
    with_depth, plain = (t.losses(model, IMAGES, labels.float())["loss"] for t in (task(StochasticDepth()), task()))
    assert torch.equal(with_depth, plain)
