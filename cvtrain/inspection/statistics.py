"""How many, how large, how bright: the figures of a data set that one wants to see before training."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvtrain.core.types import DataSets, Source
from cvtrain.inspection.views import SPLITS

_BATCH = 256


def histogram(sets: DataSets) -> dict[str, dict[str, int]]:
    """Return class -> split -> how many pictures have that label, in the order of the classes."""
    counts = {split: _counts(getattr(sets, split), sets.num_classes) for split in SPLITS}
    return {name: {split: int(counts[split][k]) for split in SPLITS} for k, name in enumerate(sets.class_names)}


def _counts(source: Source, classes: int) -> NDArray[np.int64]:
    if source.labels.ndim == 2:
        return np.asarray(source.labels.sum(axis=0, dtype=np.int64))
    return np.bincount(source.labels, minlength=classes)


def size_statistics(sizes: NDArray[np.int32]) -> dict[str, Any]:
    """Return the spread of widths, heights and aspects, and the five most frequent sizes.

    Args:
        sizes: `(N, 2)` width and height in pixels, N of 1 or more.
    """
    width, height = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    common = Counter(map(tuple, sizes.tolist())).most_common(5)
    return {
        "width": _spread(width),
        "height": _spread(height),
        "aspect": _spread(width / height),
        "common": [{"width": size[0], "height": size[1], "count": count} for size, count in common],
        "different": len(np.unique(sizes, axis=0)),
    }


def _spread(values: NDArray[np.float64]) -> dict[str, float]:
    quantiles = np.quantile(values, (0, 0.05, 0.5, 0.95, 1))
    return {
        name: round(float(value), 4)
        for name, value in zip(("min", "q05", "median", "q95", "max"), quantiles, strict=True)
    }


def channel_statistics(sets: DataSets) -> list[dict[str, float]]:
    """Return figures of each channel of the training pictures, read as the model gets them, beside what is configured.

    Values are in 0..1; `black` and `white` are the shares of the pixels at 0 and 255. Sums are of integers, exact.
    """
    levels = np.arange(256) / 255.0
    source, preprocess = sets.train, sets.preprocess
    tables = np.zeros((preprocess.channels, 256), np.int64)
    for first in range(0, len(source), _BATCH):
        images = source.read(np.arange(first, min(first + _BATCH, len(source)))).numpy()
        for channel in range(len(tables)):
            tables[channel] += np.bincount(images[:, channel].ravel(), minlength=256)
    found = []
    for table, mean, std in zip(tables, preprocess.mean, preprocess.std, strict=True):
        share = table / max(1, int(table.sum()))
        average = float(share @ levels)
        found.append(
            {
                "mean": round(average, 4),
                "std": round(float(share @ (levels - average) ** 2) ** 0.5, 4),
                "configured_mean": mean,
                "configured_std": std,
                "black": round(float(share[0]), 4),
                "white": round(float(share[255]), 4),
            }
        )
    return found
