"""The order of an epoch, a pure function of (seed, epoch) and of the labels or shards."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cvtrain.core.random import generator

Indices = NDArray[np.int64]

WINDOW_SHARDS = 4
"""Shards whose pictures are mixed with each other; all of a window must fit in the shards' local copy."""


def shuffled(count: int, seed: int, epoch: int) -> Indices:
    """Return 0..count-1 in random order."""
    return generator(seed, "order", epoch).permutation(count).astype(np.int64)


def balanced(labels: Indices, seed: int, epoch: int) -> Indices:
    """Return as many positions as there are labels, every class equally often.

    Within a class no picture comes again before all others have come, over the epochs too, so that nothing of a large
    class is left out for longer than it must be; classes differ by at most one draw an epoch.

    Args:
        labels: `(N,)` class numbers.
        seed: The run's seed.
        epoch: Epoch number, from 0.

    Returns:
        `(N,)` positions; those of small classes several times.
    """
    classes = np.unique(labels)
    each, rest = divmod(len(labels), len(classes))
    # The draws that do not divide go to other classes each epoch, in turn.
    epochs = np.arange(epoch + 1)[:, None]
    draws = each + ((np.arange(len(classes)) - epochs * rest) % len(classes) < rest)
    begins = draws[:-1].sum(axis=0)
    chosen = []
    for number, begin, count in zip(classes.tolist(), begins.tolist(), draws[-1].tolist(), strict=True):
        members = np.flatnonzero(labels == number)
        first, last = begin // len(members), (begin + count - 1) // len(members)
        rounds = [generator(seed, "balanced", number, r).permutation(members) for r in range(first, last + 1)]
        skip = begin - first * len(members)
        chosen.append(np.concatenate([members[:0], *rounds])[skip : skip + count])
    return generator(seed, "order", epoch).permutation(np.concatenate(chosen)).astype(np.int64)


def by_shard(groups: Indices, seed: int, epoch: int) -> Indices:
    """Return all positions, shards in random order, pictures mixed within windows of a few shards.

    A shard is then fetched once an epoch, while neighbours in a batch still come from several shards.

    Args:
        groups: `(N,)` shard numbers.
        seed: The run's seed.
        epoch: Epoch number, from 0.
    """
    rng = generator(seed, "shards", epoch)
    shards = rng.permutation(np.unique(groups))
    # One stable sort instead of a search for each shard.
    rank = np.empty(int(groups.max(initial=0)) + 1, np.int64)
    rank[shards] = np.arange(len(shards)) // WINDOW_SHARDS
    window = rank[groups]
    order = rng.permutation(len(groups))
    return order[np.argsort(window[order], kind="stable")].astype(np.int64)
