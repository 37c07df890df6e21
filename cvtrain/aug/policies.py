"""Augmentation policies: which operation with which strength, drawn for each sample by itself.

Operation sets, strengths and probabilities are those of torchvision.transforms.v2, interpolation and fill as well.
Everything is drawn in NumPy on the host; `policy_ops.run` moves the pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.aug.policy_ops import OPERATIONS, Plan, run
from cvtrain.aug.policy_tables import POLICIES
from cvtrain.aug.ranges import number
from cvtrain.core.types import Draw
from cvtrain.errors import ConfigError, did_you_mean

_UNSIGNED = ("Identity", "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert")


@dataclass(frozen=True)
class Space:
    """The strengths a policy chooses from.

    Attributes:
        shear: Largest shear, in pixels a pixel.
        translate: Largest translation: a share of the side where `relative`, else pixels.
        relative: See `translate`.
        rotate: Largest angle, in degrees.
        factor: Largest change of a factor from 1.
        bits: Bits that Posterize keeps at the lowest and at the highest strength.
    """

    shear: float
    translate: float
    relative: bool
    rotate: float
    factor: float
    bits: tuple[int, int]

    @lru_cache(maxsize=16)  # noqa: B019 - a handful of constants, alive as long as the module
    def magnitudes(self, bins: int, size: tuple[int, int]) -> NDArray[np.float32]:
        """Return `(len(OPERATIONS), bins)`: the strength of each operation at each level, before a sign is drawn."""
        height, width = size if self.relative else (1, 1)
        highest = {
            "ShearX": self.shear,
            "ShearY": self.shear,
            "TranslateX": self.translate * width,
            "TranslateY": self.translate * height,
            "Rotate": self.rotate,
            **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), self.factor),
        }
        table = np.zeros((len(OPERATIONS), bins), dtype=np.float32)
        for name, high in highest.items():
            # torch's steps, for a translation is cut to whole pixels and the last bit may decide.
            table[OPERATIONS.index(name)] = torch.linspace(0.0, high, bins).numpy()
        table[OPERATIONS.index("Solarize")] = torch.linspace(1.0, 0.0, bins).numpy()
        most, least = self.bits
        table[OPERATIONS.index("Posterize")] = np.rint(most - np.arange(bins) * (most - least) / max(1, bins - 1))
        return table


CUBUK = Space(shear=0.3, translate=150 / 331, relative=True, rotate=30, factor=0.9, bits=(8, 4))
WIDE = Space(shear=0.99, translate=32, relative=False, rotate=135, factor=0.99, bits=(8, 2))
AUGMIX = Space(shear=0.3, translate=1 / 3, relative=True, rotate=30, factor=0.9, bits=(4, 0))

RAND_AUGMENT = np.array([k for k, name in enumerate(OPERATIONS) if name != "Invert"])
AUGMIX_OPERATIONS = np.array([k for k, name in enumerate(OPERATIONS) if name not in ("Invert", "Identity")])
_SIGNED = np.array([name not in _UNSIGNED for name in OPERATIONS])


def plan(
    operations: NDArray[np.int64], levels: NDArray[np.int64], signs: NDArray[np.float32], table: NDArray[np.float32]
) -> Plan:
    """Look the strengths up and give half of the signed ones a minus.

    Args:
        operations: `(B, S)` positions in OPERATIONS.
        levels: `(B, S)` columns of `table`.
        signs: `(B, S)` in [0, 1).
        table: From `Space.magnitudes`.
    """
    magnitudes = table[operations, levels]
    negative = (signs < 0.5) & _SIGNED[operations]
    return Plan(operations, np.where(negative, -magnitudes, magnitudes))


def choose(choices: NDArray[np.int64], uniforms: NDArray[np.floating]) -> NDArray[np.int64]:
    """Return one of `choices`, all equally likely, for each number in [0, 1)."""
    # In float64, where nothing below 1 is rounded up to the length.
    chosen: NDArray[np.int64] = choices[(uniforms.astype(np.float64) * len(choices)).astype(np.int64)]
    return chosen


class RandAugment:
    """RandAugment (Cubuk et al. 2020, arXiv:1909.13719): operations drawn at random, all at the same strength.

    Args:
        num_ops: Operations a picture, one after the other.
        magnitude: Strength, 0 to 30.
    """

    bins = 31

    def __init__(self, num_ops: int = 2, magnitude: int = 9) -> None:
        self.num_ops = int(number("num_ops", num_ops, 1, 20))
        self.magnitude = int(number("magnitude", magnitude, 0, self.bins - 1))

    def plan(self, draw: Draw, size: tuple[int, int]) -> Plan:
        """Draw for pictures of `size` (height, width)."""
        chances, signs = np.split(draw(2 * self.num_ops), 2, axis=1)
        operations = choose(RAND_AUGMENT, chances)
        return plan(operations, np.full_like(operations, self.magnitude), signs, CUBUK.magnitudes(self.bins, size))

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to the same."""
        return run(images, self.plan(draw, (images.shape[-2], images.shape[-1])))


class TrivialAugment:
    """TrivialAugment, the wide space (Müller & Hutter 2021, arXiv:2103.10158): one operation of any strength."""

    bins = 31

    def plan(self, draw: Draw, size: tuple[int, int]) -> Plan:
        """Draw for pictures of `size` (height, width)."""
        chances, levels, signs = np.split(draw(3), 3, axis=1)
        table = WIDE.magnitudes(self.bins, size)
        return plan(choose(RAND_AUGMENT, chances), choose(np.arange(self.bins), levels), signs, table)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to the same."""
        return run(images, self.plan(draw, (images.shape[-2], images.shape[-1])))


class AutoAugment:
    """AutoAugment (Cubuk et al. 2019, arXiv:1805.09501): one of 25 learnt pairs of operations.

    Args:
        policy: The data set it was learnt on: `cifar10`, `imagenet` or `svhn`.
    """

    bins = 10

    def __init__(self, policy: str) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"aug: policy={policy} is unknown; {did_you_mean(str(policy), POLICIES, 'policies')}")
        self.policy = policy
        pairs = POLICIES[policy]
        self._operations = np.array([[OPERATIONS.index(step[0]) for step in pair] for pair in pairs])
        self._probs = np.array([[step[1] for step in pair] for pair in pairs])
        self._levels = np.array([[step[2] for step in pair] for pair in pairs])

    def plan(self, draw: Draw, size: tuple[int, int]) -> Plan:
        """Draw for pictures of `size` (height, width)."""
        uniforms = draw(5)
        pair = choose(np.arange(len(self._operations)), uniforms[:, 0])
        used = uniforms[:, 1:3] < self._probs[pair]
        operations = np.where(used, self._operations[pair], OPERATIONS.index("Identity"))
        return plan(operations, self._levels[pair], uniforms[:, 3:5], CUBUK.magnitudes(self.bins, size))

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to the same."""
        return run(images, self.plan(draw, (images.shape[-2], images.shape[-1])))
