"""Test-time augmentation: several looks at each picture, and the mean of what a model says of them.

The mean of an answer over transformed copies of a picture is as old as AlexNet's ten crops (Krizhevsky et al., NIPS
2012). It helps where the model has not learnt that the transformation changes nothing, and harms where it changes the
class: mirrored upside down a 6 is a 9.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from cvtrain.aug.geometric import affine
from cvtrain.aug.jitter import adjust_brightness, adjust_contrast
from cvtrain.errors import ConfigError, did_you_mean

View = Callable[[Tensor], Tensor]
"""Maps uint8 pictures `(B, C, H, W)` to the same shape on the same device, and leaves those it is given as they are."""

DEGREES = 5.0
CHANGE = 0.1
"""By which share brightness and contrast go up and down."""


def _turned(degrees: float) -> View:
    """Return what rotates about the centre, counter-clockwise, bilinearly; black comes from outside."""

    def view(images: Tensor) -> Tensor:
        nothing, whole = (np.full(len(images), value, dtype=np.float32) for value in (0, 1))
        return affine(images.clone(), np.full(len(images), -degrees, dtype=np.float32), (nothing, nothing), whole)

    return view


def _adjusted(function: Callable[..., Tensor], factor: float) -> View:
    return lambda images: function(images.clone(), np.full(len(images), factor, dtype=np.float32))


def _mirrored(*dims: int) -> View:
    return lambda images: images.flip(dims)


VIEWS: dict[str, dict[str, View]] = {
    "hflip": {"hflip": _mirrored(-1)},
    "flip": {"hflip": _mirrored(-1), "vflip": _mirrored(-2), "hvflip": _mirrored(-2, -1)},
    "rotate": {"rotate+5": _turned(DEGREES), "rotate-5": _turned(-DEGREES)},
    "color": {
        "brighter": _adjusted(adjust_brightness, 1 + CHANGE),
        "darker": _adjusted(adjust_brightness, 1 - CHANGE),
        "contrast+": _adjusted(adjust_contrast, 1 + CHANGE),
        "contrast-": _adjusted(adjust_contrast, 1 - CHANGE),
    },
}
"""What `tta` may name, and the views that it stands for."""


def views(names: Sequence[str], channels: int) -> dict[str, View]:
    """Return the looks at a picture that test-time augmentation takes, `identity` first.

    Args:
        names: Of `VIEWS`.
        channels: Of the pictures; those of one channel have no colour views.

    Raises:
        ConfigError: A name that is not known, or nothing but `identity` is left.
    """
    for name in names:
        if name not in VIEWS:
            raise ConfigError(f"tta={name}: {did_you_mean(name, VIEWS, 'choices')}, or none")
    chosen: dict[str, View] = {"identity": lambda images: images}
    for name in names:
        if name != "color" or channels > 1:
            chosen |= VIEWS[name]
    if len(chosen) == 1:
        raise ConfigError(f"tta=[{','.join(names)}] changes no picture of {channels} channel; try flip or rotate.")
    return chosen


def answer_views(answer: Callable[[View], Tensor], chosen: Mapping[str, View]) -> Tensor:
    """Return the mean of the probabilities over several looks at the same pictures.

    Args:
        answer: Answers all pictures through a view: calibrated probabilities `(N, K)`. Called once a view, in order.
        chosen: One or more views by name.

    Returns:
        `(N, K)` float64 in 0..1.
    """
    first, *others = chosen.values()
    total = answer(first).double()
    for view in others:
        total = total + answer(view)
    return total / len(chosen)
