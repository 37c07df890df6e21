"""Randomness as a pure function of where it is used; no global generator is ever consumed.

A draw in the data path is a function of (seed, epoch, sample index, stream name); a draw in the training step of
(seed, step, rank, stream name). Nothing has to be saved or replayed, so a resume in mid-epoch is exact with any
number of workers, and skipping to a batch costs nothing.

The counter hash is the SplitMix64 finaliser (Steele, Lea & Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014); whole permutations come from NumPy's Philox (Salmon et al., SC 2011).
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _absorb(state: NDArray[np.uint64], value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return _mix((state + _GAMMA) ^ _mix(value + _GAMMA))


def _key(*parts: int | str) -> NDArray[np.uint64]:
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        number = zlib.crc32(part.encode()) if isinstance(part, str) else part & 0xFFFFFFFFFFFFFFFF
        state = _absorb(state, np.array([number], dtype=np.uint64))
    return state


def sample_uniforms(seed: int, epoch: int, indices: NDArray[np.int64], stream: str, count: int) -> NDArray[np.float32]:
    """Draw `count` numbers for each sample.

    Args:
        seed: The run's seed.
        epoch: Epoch number, from 0.
        indices: `(B,)` positions of the samples in the training set.
        stream: Name of the operation that draws; two names give independent numbers.
        count: How many numbers a sample needs.

    Returns:
        `(B, count)` float32 in [0, 1). A row depends on its own index only, never on the batch around it.
    """
    with np.errstate(over="ignore"):
        rows = _absorb(_key(seed, epoch, stream), indices.astype(np.uint64))[:, None]
        bits = _absorb(rows, np.arange(count, dtype=np.uint64)[None, :])
    return ((bits >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24)


def generator(*key: int | str) -> np.random.Generator:
    """Return a fresh NumPy generator (Philox) that is a pure function of `key`."""
    with np.errstate(over="ignore"):
        low, high = _key("low", *key), _key("high", *key)
    return np.random.Generator(np.random.Philox(key=np.concatenate([low, high])))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed (63 bits) for torch's own generators in one training step: dropout, stochastic depth."""
    with np.errstate(over="ignore"):
        return int(_key("step", seed, step, rank)[0] >> np.uint64(1))
