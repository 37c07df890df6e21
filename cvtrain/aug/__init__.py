"""Augmentation: what training pictures go through and evaluation pictures never do."""

from cvtrain.aug.erasing import RandomErasing
from cvtrain.aug.geometric import Affine, HorizontalFlip, RandomCrop, RandomResizedCrop, Rotation, VerticalFlip
from cvtrain.aug.jitter import ColorJitter
from cvtrain.aug.mixing import CutMix, MixUp, MixUpCutMix
from cvtrain.aug.pipeline import Augmentation

__all__ = [
    "Affine",
    "Augmentation",
    "ColorJitter",
    "CutMix",
    "HorizontalFlip",
    "MixUp",
    "MixUpCutMix",
    "RandomCrop",
    "RandomErasing",
    "RandomResizedCrop",
    "Rotation",
    "VerticalFlip",
]
