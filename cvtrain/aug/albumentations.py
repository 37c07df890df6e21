"""Albumentations' transforms, from a list in YAML; needs the extra `albumentations`."""

from __future__ import annotations

import inspect
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.aug.ranges import pixels_of
from cvtrain.core.extras import import_extra
from cvtrain.core.types import Draw, Preprocess
from cvtrain.errors import ConfigError, did_you_mean

_BASES = ("BasicTransform", "BaseCompose", "DualTransform", "ImageOnlyTransform", "Transform3D")
_TRIALS = 8
"""Enough that a transform of probability 0.5 is met."""


class AlbumentationsTransform:
    """Apply Albumentations' transforms, one after the other, to one picture at a time.

    They run on the CPU: pictures on a GPU make a round trip, and the host waits for it.

    Args:
        transforms: What to apply. Each entry is a mapping: `name` is a class of Albumentations, the rest are its
            arguments. A group such as OneOf, SomeOf or Sequential holds a list of the same kind under `transforms`.

    Raises:
        ConfigError: Albumentations is not installed, or refuses an entry.
    """

    def __init__(self, transforms: Sequence[Mapping[str, Any]]) -> None:
        # Read at import: without it, Albumentations asks PyPI for its newest version.
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
        library = import_extra("albumentations", "aug=albumentations", "albumentations")
        # Threads do not pay on single small pictures, and do not survive the fork of a data worker.
        import_extra("cv2", "aug=albumentations", "albumentations").setNumThreads(1)
        kinds = (library.BasicTransform, library.BaseCompose)
        known = {
            name: value
            for name, value in vars(library).items()
            if inspect.isclass(value) and issubclass(value, kinds) and name not in _BASES
        }
        self._compose = library.Compose([_built(entry, known, f"transforms.{k}") for k, entry in enumerate(transforms)])

    def adapt(self, preprocess: Preprocess) -> None:
        """Try the transforms on pictures of the run's size, so that a bad list is told before training.

        Raises:
            ConfigError: A transform fails on them, or changes their size or type.
        """
        picture = np.full((preprocess.resize, preprocess.resize, preprocess.channels), 127, dtype=np.uint8)
        for trial in range(_TRIALS):
            self._one(picture, [trial])

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Map uint8 `(B, C, H, W)` to the same.

        Raises:
            ConfigError: A transform fails on these pictures, or changes their size or type.
        """
        seeds = (draw(2) * np.float32(2**24)).astype(np.int64)
        source, result = images.cpu(), torch.empty_like(images, device="cpu")
        for picture, target, seed in zip(pixels_of(source), pixels_of(result), seeds.tolist(), strict=True):
            target[:] = self._one(np.ascontiguousarray(picture), seed)
        return result.to(images.device)

    def _one(self, picture: NDArray[np.uint8], seed: list[int]) -> NDArray[np.uint8]:
        # One pair of generators for all transforms: set_random_seed would give each the same numbers.
        self._compose.set_random_state(np.random.default_rng(seed), random.Random(f"{seed}"))
        try:
            changed = self._compose(image=picture)["image"]
        except Exception as error:
            raise ConfigError(
                f"aug: Albumentations fails on pictures of {picture.shape} (height, width, channels): "
                f"{type(error).__name__}: {_first_line(error)}"
            ) from error
        if isinstance(changed, np.ndarray) and changed.ndim == 2:
            changed = changed[..., None]
        if getattr(changed, "dtype", None) != np.uint8 or changed.shape != picture.shape:
            raise ConfigError(
                f"aug: Albumentations turns uint8 pictures of {picture.shape} into {changed.dtype} of "
                f"{tuple(changed.shape)}.\n  Remove the transform that does it, or Resize or Crop back to the size."
            )
        return np.asarray(changed)


def _built(entry: Any, known: Mapping[str, Any], path: str) -> Any:  # noqa: ANN401 - plain values to untyped objects
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise ConfigError(f"aug: {path}={entry} is not a transform; write {{name: HorizontalFlip, p: 0.5}}")
    name = entry["name"]
    if name not in known:
        raise ConfigError(f"aug: {path}.name={name} is unknown; {did_you_mean(name, known, 'transforms')}")
    arguments = {key: value for key, value in entry.items() if key != "name"}
    parameters = inspect.signature(known[name]).parameters
    for key in arguments:
        if key not in parameters:
            names = [parameter for parameter in parameters if parameter != "kwargs"]
            raise ConfigError(f"aug: {path}: {name} has no {key}; {did_you_mean(str(key), names, 'arguments')}")
    if "transforms" in parameters:
        inner = arguments.get("transforms")
        if not isinstance(inner, Sequence) or isinstance(inner, str) or not inner:
            raise ConfigError(f"aug: {path}: {name} needs a list under `transforms`")
        arguments["transforms"] = [_built(each, known, f"{path}.transforms.{k}") for k, each in enumerate(inner)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            return known[name](**arguments)
    except Exception as error:
        raise ConfigError(f"aug: {path}: {name} refuses its arguments: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
