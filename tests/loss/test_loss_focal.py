"""Focal losses against torchvision's, the paper's formula and the cross entropies."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from cvtrain.compose import Composer
from cvtrain.errors import ConfigError
from cvtrain.loss import BinaryCrossEntropy, CrossEntropy, Focal, FocalBinaryCrossEntropy


def batch(scale=3.0):
    torch.manual_seed(0)
    return scale * torch.randn(12, 4), torch.randint(0, 4, (12,)), torch.rand(12, 4)


@pytest.mark.parametrize("weighted", [False, True])
def test_without_gamma_they_are_the_cross_entropies(weighted):
    logits, labels, soft = batch()
    weights = torch.rand(12) if weighted else None
    for targets in (F.one_hot(labels, 4).float(), soft.softmax(1)):
        assert float(Focal(0.0)(logits, targets, weights)) == pytest.approx(
            float(CrossEntropy()(logits, targets, weights)), rel=1e-5
        )
    weights = torch.rand(12, 4) if weighted else None
    assert float(FocalBinaryCrossEntropy(0.0)(logits, soft, weights)) == pytest.approx(
        float(BinaryCrossEntropy()(logits, soft, weights)), rel=1e-5
    )


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [None, 0.25, 0.9])
def test_of_whole_labels_the_binary_one_is_torchvisions(gamma, alpha):
    logits, _, soft = batch()
    targets = soft.round()
    expected = sigmoid_focal_loss(logits, targets, -1 if alpha is None else alpha, gamma, reduction="mean")
    assert float(FocalBinaryCrossEntropy(gamma, alpha)(logits, targets)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_softmax_one_is_the_formula_of_the_paper(gamma):
    logits, labels, _ = batch()
    p = logits.double().softmax(1).numpy()[np.arange(12), labels.numpy()]
    expected = -((1 - p) ** gamma * np.log(p)).mean()
    assert float(Focal(gamma)(logits, F.one_hot(labels, 4).float())) == pytest.approx(expected, rel=1e-5)


def test_of_two_classes_the_softmax_one_is_the_binary_one():
    logits, labels, _ = batch()
    pair, targets = logits[:, :2], F.one_hot(labels % 2, 2).float()
    binary = FocalBinaryCrossEntropy(2.0)(pair[:, 1:] - pair[:, :1], targets[:, 1:])
    assert float(Focal(2.0)(pair, targets)) == pytest.approx(float(binary), rel=1e-5)


@pytest.mark.parametrize("make", [Focal, FocalBinaryCrossEntropy])
def test_a_mixed_target_is_the_mixture_of_its_parts(make):
    logits, labels, _ = batch()
    one, two = F.one_hot(labels, 4).float(), F.one_hot(labels.roll(1), 4).float()
    parts = 0.3 * make()(logits, one) + 0.7 * make()(logits, two)
    assert float(make()(logits, 0.3 * one + 0.7 * two)) == pytest.approx(float(parts), rel=1e-5)


@pytest.mark.parametrize("make", [Focal, FocalBinaryCrossEntropy])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_gradients_are_finite_also_for_certain_answers_and_a_small_gamma(make, gamma, scale):
    logits, labels, _ = batch(scale)
    logits = logits.requires_grad_()
    make(gamma)(logits, F.one_hot(labels, 4).float()).backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("make", [Focal, FocalBinaryCrossEntropy])
def test_gradients_are_those_of_finite_differences(make):
    class Double(torch.Tensor):
        """Keeps float64 where the losses ask for float32."""

        def float(self):
            return self

    logits, labels, _ = batch(1.0)
    targets = F.one_hot(labels, 4).double()
    assert torch.autograd.gradcheck(
        lambda x: make()(x.as_subclass(Double), targets).as_subclass(torch.Tensor), logits.double().requires_grad_()
    )


@pytest.mark.parametrize(("make", "weights"), [(Focal, torch.rand(12)), (FocalBinaryCrossEntropy, torch.rand(12, 4))])
def test_low_precision_logits_are_computed_in_float32(make, weights):
    logits, labels, _ = batch()
    low, targets = logits.bfloat16(), F.one_hot(labels, 4).float()
    for extra in ((), (weights,)):
        assert make()(low, targets, *extra).dtype == torch.float32
        assert torch.equal(make()(low, targets, *extra), make()(low.float(), targets, *extra))


@pytest.mark.parametrize("make", [Focal, FocalBinaryCrossEntropy])
def test_uneven_parts_weighted_by_their_share_give_the_gradient_of_the_large_batch(make):
    logits, labels, _ = batch()
    targets = F.one_hot(labels, 4).float()
    weights = torch.rand(12) if make is Focal else torch.rand(12, 4)
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    make()(whole, targets, weights).backward()
    for chosen in (slice(0, 5), slice(5, 12)):
        loss = make()(parts[chosen], targets[chosen], weights[chosen])
        (loss * len(targets[chosen]) / 12).backward()
    assert torch.allclose(whole.grad, parts.grad, atol=1e-7)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task=multilabel", "loss=focal"], ["task=multilabel and loss=focal:", "use loss=focal_bce"]),
        (["loss=focal_bce"], ["task=classification and loss=focal_bce:", "use loss=focal,"]),
        (["loss=focal", "loss.focal_gamma=-1"], ["loss.focal_gamma=-1", "of at least 0"]),
        (["task=multilabel", "loss=focal_bce", "loss.focal_alpha=2"], ["loss.focal_alpha=2", "at most 1"]),
    ],
)
def test_a_loss_that_does_not_fit_the_task_is_refused_with_the_one_that_does(overrides, words):
    with pytest.raises(ConfigError) as refused:
        Composer("train", None).check(overrides, [])
    assert all(word in str(refused.value) for word in words), refused.value
