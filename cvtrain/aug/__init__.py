"""Augmentation: what training pictures go through and evaluation pictures never do."""

from cvtrain.aug.albumentations import AlbumentationsTransform
from cvtrain.aug.augmix import AugMix
from cvtrain.aug.blur import GaussianBlur
from cvtrain.aug.erasing import RandomErasing
from cvtrain.aug.geometric import Affine, HorizontalFlip, RandomCrop, RandomResizedCrop, Rotation, VerticalFlip
from cvtrain.aug.grey import Greyscale
from cvtrain.aug.jitter import ColorJitter
from cvtrain.aug.mixing import CutMix, MixUp, MixUpCutMix
from cvtrain.aug.noise import GaussianNoise, SaltAndPepper
from cvtrain.aug.perspective import Perspective
from cvtrain.aug.pipeline import Augmentation
from cvtrain.aug.policies import AutoAugment, RandAugment, TrivialAugment

__all__ = [
    "Affine",
    "AlbumentationsTransform",
    "AugMix",
    "Augmentation",
    "AutoAugment",
    "ColorJitter",
    "CutMix",
    "GaussianBlur",
    "GaussianNoise",
    "Greyscale",
    "HorizontalFlip",
    "MixUp",
    "MixUpCutMix",
    "Perspective",
    "RandAugment",
    "RandomCrop",
    "RandomErasing",
    "RandomResizedCrop",
    "Rotation",
    "SaltAndPepper",
    "TrivialAugment",
    "VerticalFlip",
]
