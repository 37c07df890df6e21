"""Operations that mix the samples of a batch and their labels.

The mixing weight λ is drawn once a batch, as in the papers. `alpha` = 0 turns an operation off.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from cvtrain.aug.ranges import number, to_device


def mix_up(images: Tensor, targets: Tensor, partner: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Blend each sample with its partner.

    Args:
        images: Float `(B, C, H, W)`.
        targets: Float `(B, K)`.
        partner: `(B,)` int64, the position of each sample's partner.
        lam: Weight of the sample itself, 0..1.

    Returns:
        λ x_i + (1 - λ) x_j and λ y_i + (1 - λ) y_j.
    """
    return images * lam + images[partner] * (1.0 - lam), targets * lam + targets[partner] * (1.0 - lam)


def cut_box(size: tuple[int, int], lam: float, centre: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the rows and columns (top, bottom, left, right; ends excluded) that CutMix pastes.

    Its sides are √(1 - λ) of the picture's, rounded down, cut off at the border.

    Args:
        size: H and W.
        lam: The λ that was drawn.
        centre: Row and column.
    """
    side = math.sqrt(1.0 - lam)
    height, width = int(size[0] * side), int(size[1] * side)
    top, left = centre[0] - height // 2, centre[1] - width // 2
    return max(top, 0), min(top + height, size[0]), max(left, 0), min(left + width, size[1])


def cut_mix(images: Tensor, targets: Tensor, partner: Tensor, box: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Paste a box of each sample's partner into it and weight the labels by the area.

    Args:
        images: Float `(B, C, H, W)`.
        targets: Float `(B, K)`.
        partner: `(B,)` int64, the position of each sample's partner.
        box: top, bottom, left, right, ends excluded.

    Returns:
        The mixed images and targets; λ is the share of pixels that stayed.
    """
    top, bottom, left, right = box
    lam = 1.0 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    return mixed, targets * lam + targets[partner] * (1.0 - lam)


class MixUp:
    """Blend pairs of pictures and their labels (Zhang et al. 2018, arXiv:1710.09412).

    Args:
        alpha: λ ~ Beta(alpha, alpha); 0 means off.
        prob: Share of the batches that are mixed.
    """

    def __init__(self, alpha: float = 0.2, prob: float = 1.0) -> None:
        self.alpha = number("alpha", alpha)
        self.prob = number("prob", prob, 0, 1)

    def __call__(self, images: Tensor, targets: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Map images float `(B, C, H, W)` and targets float `(B, K)` to the same shapes."""
        if self.alpha == 0 or rng.random() >= self.prob:
            return images, targets
        lam = float(rng.beta(self.alpha, self.alpha))
        return mix_up(images, targets, to_device(rng.permutation(len(images)), images.device), lam)


class CutMix:
    """Paste a box of one picture into another and mix the labels by area (Yun et al. 2019, arXiv:1905.04899).

    Args:
        alpha: λ ~ Beta(alpha, alpha) before the correction to the pasted area; 0 means off.
        prob: Share of the batches that are mixed.
    """

    def __init__(self, alpha: float = 1.0, prob: float = 1.0) -> None:
        self.alpha = number("alpha", alpha)
        self.prob = number("prob", prob, 0, 1)

    def __call__(self, images: Tensor, targets: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Map images float `(B, C, H, W)` and targets float `(B, K)` to the same shapes."""
        if self.alpha == 0 or rng.random() >= self.prob:
            return images, targets
        size = (images.shape[-2], images.shape[-1])
        lam = float(rng.beta(self.alpha, self.alpha))
        box = cut_box(size, lam, (int(rng.integers(size[0])), int(rng.integers(size[1]))))
        return cut_mix(images, targets, to_device(rng.permutation(len(images)), images.device), box)


class MixUpCutMix:
    """Do one of the two with each batch.

    Args:
        mixup_alpha: MixUp's alpha; 0 means off.
        cutmix_alpha: CutMix's alpha; 0 means off.
        switch_prob: Share of the batches that get CutMix.
    """

    def __init__(self, mixup_alpha: float = 0.2, cutmix_alpha: float = 1.0, switch_prob: float = 0.5) -> None:
        self.mixup = MixUp(mixup_alpha)
        self.cutmix = CutMix(cutmix_alpha)
        self.switch_prob = number("switch_prob", switch_prob, 0, 1)

    def __call__(self, images: Tensor, targets: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Map images float `(B, C, H, W)` and targets float `(B, K)` to the same shapes."""
        chosen = self.cutmix if rng.random() < self.switch_prob else self.mixup
        return chosen(images, targets, rng)
