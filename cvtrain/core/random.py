"""Randomness as a pure function of where it is used; no global generator is ever consumed.

A draw in the data path is a function of (seed, epoch, sample index, stream name); a draw in the training step of
(seed, step, rank, stream name). Nothing has to be saved or replayed, so a resume in mid-epoch is exact with any
number of workers, and skipping to a batch costs nothing.

The counter hash is the SplitMix64 finaliser (Steele, Lea & Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014); whole permutations come from NumPy's Philox (Salmon et al., SC 2011).
"""

from __future__ import annotations

import functools
import zlib

import numpy as np
import torch
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_WHOLE_GAMMA = int(_GAMMA)
_WHOLE_FACTORS = tuple(int(factor) for factor in _FACTORS)
_MASK = 0xFFFFFFFFFFFFFFFF


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the hash of `x`, in its memory."""
    x ^= x >> _SHIFTS[0]
    x *= _FACTORS[0]
    x ^= x >> _SHIFTS[1]
    x *= _FACTORS[1]
    x ^= x >> _SHIFTS[2]
    return x


@functools.cache
def _columns(count: int) -> NDArray[np.uint64]:
    """Return the hashes of 0, 1, … count - 1."""
    return _mix(np.arange(count, dtype=np.uint64) + _GAMMA)


def _mix_one(x: int) -> int:
    """Do to one number what `_mix` does to many; a tenth of NumPy's price."""
    x = ((x ^ (x >> 30)) * _WHOLE_FACTORS[0]) & _MASK
    x = ((x ^ (x >> 27)) * _WHOLE_FACTORS[1]) & _MASK
    return x ^ (x >> 31)


def _hash(*parts: int | str) -> int:
    state, gamma = 0, _WHOLE_GAMMA
    for part in parts:
        number = zlib.crc32(part.encode()) if isinstance(part, str) else part & _MASK
        state = _mix_one(((state + gamma) & _MASK) ^ _mix_one((number + gamma) & _MASK))
    return state


def _key(*parts: int | str) -> NDArray[np.uint64]:
    return np.array([_hash(*parts)], dtype=np.uint64)


@functools.lru_cache(maxsize=256)
def _stream(seed: int, epoch: int, stream: str) -> NDArray[np.uint64]:
    """Return where an operation's numbers of an epoch begin; asked for with every batch."""
    return _key(seed, epoch, stream) + _GAMMA


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
    # Arrays of integers overflow without a word, as the hash wants it.
    start = _stream(seed, epoch, stream)
    rows = _mix(_mix(indices.astype(np.uint64) + _GAMMA) ^ start) + _GAMMA
    bits = _mix(rows[:, None] ^ _columns(count))
    return ((bits >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24)


def generator(*key: int | str) -> np.random.Generator:
    """Return a fresh NumPy generator (Philox) that is a pure function of `key`."""
    low, high = _key("low", *key), _key("high", *key)
    return np.random.Generator(np.random.Philox(key=np.concatenate([low, high])))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed (63 bits) for torch's own generators in one training step: dropout, stochastic depth."""
    return _hash("step", seed, step, rank) >> 1


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed the generators that a step on `device` draws from; `torch.manual_seed` seeds every device's, at 100 µs."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
