"""What a deployed file says of itself, read without torch: preprocessing, class names, temperature."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvtrain.core.picture import BILINEAR, INTERPOLATIONS
from cvtrain.errors import WeightsError

MULTILABEL = "multilabel"
"""Value of `task` in a deployed file when every class is decided by itself; without the key one class is chosen."""


@dataclass(frozen=True)
class Preparation:
    """How a file wants its pictures prepared: `core.types.Preprocess` in NumPy, equal to it to the bit.

    Attributes:
        img_size: Side of the square the model sees, in pixels.
        resize: Side of the square that is read, in pixels.
        scale: `(C, 1, 1)` float32 factors of bytes.
        shift: `(C, 1, 1)` float32 summands.
        interpolation: How a picture is resized where it is read: one of `core.picture.INTERPOLATIONS`.
    """

    img_size: int
    resize: int
    scale: NDArray[np.float32]
    shift: NDArray[np.float32]
    interpolation: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of a picture as it is read."""
        return len(self.scale), self.resize, self.resize

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Turn uint8 `(B, C, resize, resize)` into the model's float32 `(B, C, img_size, img_size)`."""
        margin = (images.shape[-1] - self.img_size) // 2
        inside = slice(margin, margin + self.img_size)
        pixels = images[..., inside, inside].astype(np.float32, order="C")
        pixels *= self.scale
        pixels += self.shift
        return pixels


def preparation(metadata: Mapping[str, str], path: Path) -> Preparation:
    """Return how the file at `path` wants its pictures prepared.

    Raises:
        WeightsError: Its metadata do not say it, or are damaged.
    """
    values = _parse(metadata, "preprocess", path)
    try:
        mean, std = (np.array(values[key], dtype=np.float64).reshape(-1, 1, 1) for key in ("mean", "std"))
        img_size, resize = int(values["img_size"]), int(values["resize"])
        interpolation = str(values.get("interpolation", BILINEAR))
        fits = len(mean) == len(std) == int(values["channels"]) and 0 < img_size <= resize
        fits &= interpolation in INTERPOLATIONS
        if not (fits and np.all(np.isfinite(mean)) and np.all(std > 0)):
            raise ValueError(values)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} has a damaged preprocessing ({error!r}). Export it again.") from error
    scale, shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
    return Preparation(img_size, resize, scale, shift, interpolation)


def class_names(metadata: Mapping[str, str], path: Path) -> list[str]:
    """Return the names of the columns that the file at `path` answers with.

    Raises:
        WeightsError: Its metadata do not say it.
    """
    names = _parse(metadata, "class_names", path)
    if not isinstance(names, list):
        raise WeightsError(f"{path} has damaged class names. Export it again.")
    return [str(name) for name in names]


def temperature(metadata: Mapping[str, str], path: Path) -> float:
    """Return what the logits of the file at `path` are divided by before they become probabilities; 1 by default.

    Raises:
        WeightsError: It is not a positive number.
    """
    text = metadata.get("temperature", "1")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise WeightsError(f"{path} has a damaged temperature ({text!r}). Export it again.")
    return value


def _parse(metadata: Mapping[str, str], key: str, path: Path) -> Any:  # noqa: ANN401 - any JSON value
    if key not in metadata:
        raise WeightsError(f"{path} carries no {key!r}; it was not written by cvtrain. Use a file of a run's folder.")
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its {key!r} is not JSON ({error}). Export it again.") from error
