"""MixUp and CutMix against an independent NumPy version and the papers' statements."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch.nn import functional as F

from cvtrain.aug import CutMix, MixUp, MixUpCutMix
from cvtrain.core.random import generator


def batch(count=16, classes=5, size=11, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.rand((count, 3, size, size + 2), generator=g)
    labels = torch.randint(classes, (count,), generator=g)
    return images, F.one_hot(labels, classes).float()


class Script(np.random.Generator):
    """A generator whose λ, box centre and permutation are given."""

    def __new__(cls, *args):
        return super().__new__(cls, np.random.Philox(0))

    def __init__(self, lam, order, centre=(0, 0)):
        super().__init__(np.random.Philox(0))
        self.lam, self.order, self.centre = lam, np.asarray(order), list(centre)

    def random(self, *_):
        return 0.0

    def beta(self, *_):
        return self.lam

    def integers(self, *_):
        return self.centre.pop(0)

    def permutation(self, *_):
        return self.order


def test_mixup_equals_the_papers_formula_in_numpy():
    images, targets = batch()
    order = np.roll(np.arange(16), 3)
    mixed, soft = MixUp(alpha=1.0)(images, targets, Script(0.3, order))
    x, y = images.numpy(), targets.numpy()
    np.testing.assert_allclose(mixed.numpy(), 0.3 * x + 0.7 * x[order], atol=1e-6)
    np.testing.assert_allclose(soft.numpy(), 0.3 * y + 0.7 * y[order], atol=1e-6)


@pytest.mark.parametrize("centre", [(5, 6), (0, 0), (10, 12), (1, 11), (10, 0)])
@pytest.mark.parametrize("lam", [0.0, 0.2, 0.55, 0.97, 1.0])
def test_cutmix_pastes_the_papers_box_and_weights_labels_by_the_pixels_counted(lam, centre):
    images, targets = batch()
    order = np.roll(np.arange(16), 1)
    mixed, soft = CutMix(alpha=1.0)(images, targets, Script(lam, order, centre))

    x = images.numpy()
    height, width = int(11 * np.sqrt(1 - lam)), int(13 * np.sqrt(1 - lam))
    expected = x.copy()
    count = 0
    for row in range(11):
        for column in range(13):
            top, left = centre[0] - height // 2, centre[1] - width // 2
            if top <= row < top + height and left <= column < left + width:
                expected[:, :, row, column] = x[order][:, :, row, column]
                count += 1
    np.testing.assert_array_equal(mixed.numpy(), expected)
    kept = (mixed == images).all(dim=1).float().mean(dim=(1, 2))
    torch.testing.assert_close(kept, torch.full((16,), 1 - count / 143))
    y = targets.numpy()
    share = 1 - count / 143
    np.testing.assert_allclose(soft.numpy(), share * y + (1 - share) * y[order], atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_the_weight_of_mixup_is_beta_distributed(alpha):
    images, targets = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.eye(2)
    weights = []
    for step in range(1500):
        mixed, soft = MixUp(alpha)(images, targets, generator(1, "mix", step, 0))
        # With the permutation that changes nothing λ cannot be read off.
        if float(soft[0, 0]) != 1.0:
            weights.append(float(soft[0, 0]))
            assert float(mixed[0]) == pytest.approx(1.0 - float(soft[0, 0]), abs=1e-6)
    assert len(weights) > 600
    # λ of which the complement is used has the same, symmetric distribution.
    assert kstest(weights, "beta", args=(alpha, alpha)).pvalue > 0.01


def test_the_centre_of_cutmix_is_uniform_over_the_picture():
    images, targets = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 10, 10).contiguous(), torch.eye(2)
    pasted = torch.zeros(10, 10)
    used = 0
    for step in range(3000):
        mixed, _ = CutMix(1.0)(images, targets, generator(2, "mix", step, 0))
        pasted += mixed[0, 0]
        used += bool(mixed[0].any())
    assert used > 1000
    # Symmetric in all directions, thinner at the border.
    for turned in (pasted.flip(0), pasted.flip(1), pasted.T):
        assert float((pasted - turned).abs().max()) < 0.15 * float(pasted.max())
    assert float(pasted[0, 0]) < float(pasted[5, 5])


@pytest.mark.parametrize("op", [MixUp(1.0), CutMix(1.0), MixUpCutMix(1.0, 1.0)])
def test_a_mixed_batch_keeps_total_probability_and_range(op):
    images, targets = batch()
    for step in range(50):
        mixed, soft = op(images, targets, generator(3, "mix", step, 0))
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(16))
        assert mixed.shape == images.shape
        assert float(mixed.min()) >= 0.0
        assert float(mixed.max()) <= 1.0


@pytest.mark.parametrize("op", [MixUp(1.0), CutMix(1.0)])
def test_the_loss_on_soft_targets_is_the_weighted_sum_of_two_losses(op):
    images, targets = batch()
    logits = torch.randn((16, 5), generator=torch.Generator().manual_seed(9))
    order = np.roll(np.arange(16), 5)
    _, soft = op(images, targets, Script(0.4, order, (5, 6)))
    labels = targets.argmax(dim=1)
    other = labels[torch.from_numpy(order)]
    differs = torch.nonzero(labels != other)[0, 0]
    lam = float(soft[differs, labels[differs]])
    expected = lam * F.cross_entropy(logits, labels) + (1 - lam) * F.cross_entropy(logits, other)
    torch.testing.assert_close(F.cross_entropy(logits, soft), expected)


@pytest.mark.parametrize(
    "op", [MixUp(0.0), CutMix(0.0), MixUpCutMix(0.0, 0.0), MixUp(1.0, prob=0.0), CutMix(1.0, prob=0.0)]
)
def test_alpha_or_prob_of_zero_means_off(op):
    images, targets = batch()
    mixed, soft = op(images, targets, generator(0))
    assert mixed is images
    assert soft is targets


def test_prob_is_the_share_of_batches_that_are_mixed():
    images, targets = batch()
    mixed = sum(MixUp(1.0, prob=0.25)(images, targets, generator(4, s))[0] is not images for s in range(1500))
    assert abs(mixed / 1500 - 0.25) < 0.034  # three standard errors


def test_switch_prob_is_the_share_of_batches_that_get_cutmix():
    images, targets = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 6, 6), torch.eye(4)
    op = MixUpCutMix(mixup_alpha=0.0, cutmix_alpha=1.0, switch_prob=0.3)
    cut = sum(op(images, targets, generator(5, s))[0] is not images for s in range(1500))
    assert abs(cut / 1500 - 0.3) < 0.036  # three standard errors


@pytest.mark.parametrize("op", [MixUp(1.0), CutMix(1.0)])
def test_mixing_changes_neither_images_nor_targets_in_place(op):
    images, targets = batch()
    before = images.clone(), targets.clone()
    op(images, targets, generator(6))
    assert torch.equal(images, before[0])
    assert torch.equal(targets, before[1])
