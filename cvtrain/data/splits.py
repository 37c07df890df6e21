"""Splitting a data set by ratio, and the checks every data set passes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cvtrain.core.random import generator
from cvtrain.core.types import BILINEAR, DataSets, Preprocess
from cvtrain.errors import ConfigError, DataError

Indices = NDArray[np.int64]


def fraction(name: str, value: float) -> float:
    """Return a share of the data.

    Raises:
        ConfigError: It is not in (0, 1).
    """
    if not 0.0 < value < 1.0:
        raise ConfigError(f"data.{name}={value} is out of range\n  allowed: above 0 and below 1")
    return float(value)


def stratified(labels: Indices, fractions: tuple[float, ...], seed: int) -> list[Indices]:
    """Split positions at random, class by class.

    A class of n gives each part round(n × fraction), but at least one when it can still keep one for training.

    Args:
        labels: `(N,)` class numbers, or `(N, K)` of 0 and 1.
        fractions: Share of each part to carve; the rest is training.
        seed: Equal seeds and labels give equal splits.

    Returns:
        The training positions, then each part's, all ascending.

    Raises:
        ConfigError: The fractions leave nothing for training.
    """
    if sum(fractions) >= 1.0:
        raise ConfigError(f"data: val_fraction and test_fraction sum to {sum(fractions):g}\n  allowed: below 1")
    parts: list[list[Indices]] = [[] for _ in range(len(fractions) + 1)]
    kinds = strata(labels)
    for number in np.unique(kinds):
        members = np.flatnonzero(kinds == number)
        total = len(members)
        members = members[generator(seed, "split", int(number)).permutation(total)]
        for part, share in enumerate(fractions, start=1):
            count = min(max(round(share * total), 1), len(members) - 1)
            parts[part].append(members[:count])
            members = members[count:]
        parts[0].append(members)
    return [np.sort(np.concatenate(part)) if part else np.empty(0, np.int64) for part in parts]


def strata(labels: Indices) -> Indices:
    """Return `(N,)` numbers of what is to be spread evenly: the class, or the rarest label a picture has.

    Whole combinations of labels would mostly occur once, and could not be spread at all.

    Args:
        labels: `(N,)` class numbers, or `(N, K)` of 0 and 1; K stands for a picture without a label.
    """
    if labels.ndim == 1:
        return labels
    rarity = np.argsort(np.argsort(labels.sum(axis=0), kind="stable"))
    rarest: Indices = np.where(labels == 1, rarity, labels.shape[1]).min(axis=1).astype(np.int64)
    return rarest


def fold_of(labels: Indices, folds: int, fold: int, seed: int) -> tuple[Indices, Indices]:
    """Split positions for cross-validation, stratified; each position is in one fold.

    Args:
        labels: `(N,)` class numbers, or `(N, K)` of 0 and 1.
        folds: Number of folds, 2 or more.
        fold: Which one to hold out, from 0.
        seed: Equal seeds and labels give equal folds.

    Returns:
        The positions outside and inside the fold, ascending.

    Raises:
        DataError: Fewer pictures than folds.
    """
    if len(labels) < folds:
        raise DataError(f"data.folds={folds}: there are only {len(labels)} pictures\n  use fewer folds")
    kinds = strata(labels)
    number = np.empty(len(labels), np.int64)
    dealt = 0
    # Dealt like cards, each class going on where the last one ended: folds differ in size by one at most.
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        members = members[generator(seed, "fold", int(kind)).permutation(len(members))]
        number[members] = (dealt + np.arange(len(members))) % folds
        dealt += len(members)
    return np.flatnonzero(number != fold), np.flatnonzero(number == fold)


def limited(labels: Indices, limit: int, seed: int) -> Indices:
    """Return `limit` positions, ascending, every class with its share (largest remainders), but at least one.

    Args:
        labels: `(N,)` class numbers, or `(N, K)` of 0 and 1.
        limit: How many; all when there are fewer.
        seed: Equal seeds and labels give equal subsets; a smaller limit gives a subset of a larger one's, as far as
            the shares allow.

    Raises:
        ConfigError: Fewer than one picture a class.
    """
    kinds = strata(labels)
    numbers, counts = np.unique(kinds, return_counts=True)
    if limit >= len(labels):
        return np.arange(len(labels), dtype=np.int64)
    if limit < len(numbers) and labels.ndim == 1:
        raise ConfigError(
            f"data.limit={limit} is below the {len(numbers)} classes\n  allowed: one picture a class or more"
        )
    exact = counts * (limit / counts.sum())
    shares = np.maximum(np.floor(exact).astype(np.int64), 1 if limit >= len(numbers) else 0)
    by_remainder = np.argsort(shares - exact, kind="stable")
    while shares.sum() < limit:
        for position in by_remainder[: limit - shares.sum()]:
            shares[position] += shares[position] < counts[position]
    while shares.sum() > limit:
        shares[np.argmax(shares)] -= 1
    chosen = []
    for number, share in zip(numbers, shares, strict=True):
        members = np.flatnonzero(kinds == number)
        chosen.append(members[generator(seed, "limit", int(number)).permutation(len(members))][:share])
    return np.sort(np.concatenate(chosen))


def input_size(native: int, img_size: int | None, eval_resize: float) -> tuple[int, int]:
    """Return the side the model sees and the side that is read, in pixels.

    Args:
        native: Side to take when `img_size` is None.
        img_size: Side the model sees.
        eval_resize: Side that is read, as a multiple of the side the model sees.

    Raises:
        ConfigError: A side below 1, or a multiple below 1.
    """
    size = native if img_size is None else img_size
    if size < 1 or not math.isfinite(eval_resize) or eval_resize < 1.0:
        raise ConfigError(f"img_size={size}, aug.eval_resize={eval_resize}\n  allowed: both 1 or more")
    return size, round(size * eval_resize)


def per_channel(name: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    """Return numbers given a channel as a tuple; None stays None.

    Raises:
        ConfigError: Something else than a list of numbers.
    """
    try:
        return None if values is None else tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise ConfigError(f"data.{name}={values} is not a list of numbers\n  allowed: one number a channel") from None


def measured(pixels: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation a channel of uint8 `(N, H, W, C)`, in 0..1, to 4 decimals."""
    count = pixels[..., 0].size
    # Exact integer sums of a histogram: no float copy of the whole set, no rounding that depends on its order.
    tables = [np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(pixels.shape[-1])]
    levels = np.arange(256) / 255.0
    means = [float(table @ levels) / count for table in tables]
    stds = [float(table @ (levels - mean) ** 2 / count) ** 0.5 for table, mean in zip(tables, means, strict=True)]
    return tuple(round(mean, 4) for mean in means), tuple(round(std, 4) for std in stds)


def preprocessing(
    sizes: tuple[int, int, int], mean: tuple[float, ...], std: tuple[float, ...], interpolation: str = BILINEAR
) -> Preprocess:
    """Return the preprocessing for `sizes` = (img_size, resize, channels).

    Raises:
        ConfigError: Not one mean and one positive std a channel.
    """
    img_size, resize, channels = sizes
    if len(mean) != channels or len(std) != channels or not all(value > 0 for value in std):
        raise ConfigError(
            f"data.mean={list(mean)}, data.std={list(std)} do not fit {channels} channel(s)\n"
            f"  allowed: {channels} number(s) each, std above 0"
        )
    return Preprocess(img_size, resize, channels, mean, std, interpolation)


def checked(sets: DataSets) -> DataSets:
    """Return `sets` if a classifier can be trained on it.

    Raises:
        DataError: An empty split, a label outside 0..K-1, or fewer than two classes.
    """
    if sets.num_classes < 2:
        raise DataError(
            f"data {sets.name}: one class ({', '.join(sets.class_names) or 'none'})\n"
            "  a classifier needs two or more; add the folder or files of another class"
        )
    for split in ("train", "val", "test"):
        source = getattr(sets, split)
        if len(source) == 0:
            raise DataError(
                f"data {sets.name}: the {split} split is empty\n"
                "  a class of one picture gives it to training, one of two to train and one other split: add pictures"
            )
        if sets.multilabel:
            continue
        wrong = np.flatnonzero((source.labels < 0) | (source.labels >= sets.num_classes))
        if len(wrong):
            first = int(wrong[0])
            raise DataError(
                f"data {sets.name}: {len(wrong)} label(s) of {split} are out of range, "
                f"first {int(source.labels[first])} at {source.names[first]}\n"
                f"  allowed: 0 to {sets.num_classes - 1} ({sets.num_classes} classes)"
            )
    return sets
