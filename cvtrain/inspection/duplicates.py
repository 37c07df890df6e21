"""Pictures that occur twice: the same bytes, the same pixels, or nearly the same picture.

Near duplicates are sought in two steps. A descriptor of 43 low cosine frequencies names each picture's few nearest
others, by products of matrices a strip at a time; each such pair is then aligned and compared (`alignment`). What is
near depends on the data: two ones of MNIST are closer to each other than two photographs ever are, so that a pair must
be several times closer than the pictures that surround it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cvtrain.inspection.alignment import cosine_basis, residuals
from cvtrain.inspection.views import SIDE, Views

CANDIDATES = 4
"""Nearest pictures by descriptor that are compared; the last of them stands for the pictures that surround a pair."""
LARGEST_RESIDUAL = 0.08
"""What two copies may differ by where nothing else is near; JPEG of quality 30 stays below it on most photographs."""
FLAT = 6.0
"""Grey levels of standard deviation below which a picture holds too little to be compared."""
_SMALL, _LEAST_SMALL, _LEAST = 64, 0.002, 0.02
_FEWEST_COSINE = 0.6
_COLOUR = 20.0
_STRIP = 256
_PAIRS = 512


@dataclass(frozen=True)
class Group:
    """Pictures that are the same.

    Attributes:
        kind: `bytes`, `pixels` or `near`: what all its pairs have at least in common.
        rows: Rows of `Views`, ascending; two or more.
        residual: The largest residual among the pairs that hold a near group together, else 0.
    """

    kind: str
    rows: tuple[int, ...]
    residual: float = 0.0


@dataclass(frozen=True)
class Found:
    """What the search found.

    Attributes:
        groups: Groups of the same picture, of the exact kinds first; a picture is in one exact and one near group.
        flat: How many pictures are too uniform to be compared.
    """

    groups: list[Group]
    flat: int


def search(views: Views, closer: float | None = 8.0) -> Found:
    """Find all duplicates.

    Args:
        views: N looks; memory grows with N, time of the near search with N², at about 5 · 10⁸ pairs a second.
        closer: How many times closer than its surroundings a near duplicate is; None leaves the near search out.
    """
    exact = _same("bytes", views.content or []) + _same("pixels", views.pixels)
    listed = {group.rows for group in exact if group.kind == "bytes"}
    exact = [group for group in exact if group.kind == "bytes" or group.rows not in listed]
    if closer is None:
        return Found(exact, 0)
    # Of pictures with the same pixels one takes part in the near search.
    first: dict[bytes, int] = {}
    for row, digest in enumerate(views.pixels):
        first.setdefault(digest, row)
    contrast = views.grey.reshape(len(views), -1).std(1, dtype=np.float32)
    rows = np.array([row for row in first.values() if contrast[row] >= FLAT], np.int64)
    pairs = near_pairs(views.grey[rows], views.colour[rows], views.sizes[rows], closer)
    joined = [(int(rows[a]), int(rows[b]), residual) for a, b, residual in pairs]
    return Found(exact + _near_groups(joined), int((contrast < FLAT).sum()))


def near_pairs(
    grey: NDArray[np.uint8], colour: NDArray[np.uint8], sizes: NDArray[np.int32], closer: float = 8.0
) -> list[tuple[int, int, float]]:
    """Find pairs of nearly the same picture.

    Args:
        grey: uint8 `(N, 32, 32)`, no two of them equal, none uniform.
        colour: uint8 `(N, 4, 4, 3)`.
        sizes: `(N, 2)` width and height of the whole pictures, in pixels.
        closer: How many times closer than its surroundings a pair must be.

    Returns:
        Positions a < b, and their residual.
    """
    count = len(grey)
    if count < 2:
        return []
    near, cosine = nearest(descriptors(grey), min(CANDIDATES, count - 1))
    a = np.repeat(np.arange(count), near.shape[1])
    b = near.ravel()
    pairs, where = np.unique(np.stack([np.minimum(a, b), np.maximum(a, b)], 1), axis=0, return_inverse=True)
    closeness = np.zeros(len(pairs), np.float32)
    closeness[where] = cosine.ravel()
    left = np.ones(len(pairs), np.float32)
    worth = np.flatnonzero(closeness >= _FEWEST_COSINE)
    left[worth] = _compare(grey, pairs[worth])
    surroundings = _surroundings(left[where].reshape(near.shape), pairs)
    floor = np.where(sizes[pairs].min(axis=(1, 2)) < _SMALL, _LEAST_SMALL, _LEAST)
    allowed = np.clip(surroundings / closer, floor, LARGEST_RESIDUAL)
    # The other way round a crop is a stretch inwards, which loses less at the border.
    again = np.flatnonzero((left > allowed) & (left <= 4 * allowed))
    left[again] = np.minimum(left[again], _compare(grey, pairs[again][:, ::-1]))
    away = np.abs(colour[pairs[:, 0]].astype(np.float32) - colour[pairs[:, 1]]).mean((1, 2, 3))
    kept = np.flatnonzero((left <= allowed) & (away <= _COLOUR))
    return [(int(pairs[k, 0]), int(pairs[k, 1]), max(0.0, float(left[k]))) for k in kept]


def descriptors(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the low frequencies without the mean, weighted up with the frequency, of length 1: `(N, 64)`."""
    basis = cosine_basis(SIDE)[:8]
    u = np.arange(8)
    weight = np.sqrt(np.hypot(u[:, None], u[None, :])) * (u[:, None] + u[None, :] <= 8)
    found = np.empty((len(grey), 64), np.float32)
    for first in range(0, len(grey), _PAIRS):
        part = basis @ grey[first : first + _PAIRS].astype(np.float32) @ basis.T
        found[first : first + _PAIRS] = (part * weight).reshape(-1, 64)
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)
    return found


def nearest(vectors: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the `count` nearest others of each of N vectors of length 1, and their cosines: both `(N, count)`.

    Exact; strips of 256 rows at a time, so that memory grows with N only.
    """
    everything = torch.from_numpy(vectors)
    found = np.empty((len(vectors), count), np.int64)
    cosines = np.empty((len(vectors), count), np.float32)
    for first in range(0, len(vectors), _STRIP):
        strip = everything[first : first + _STRIP] @ everything.T
        rows = torch.arange(len(strip))
        strip[rows, rows + first] = -2.0
        top = strip.topk(count, dim=1)
        found[first : first + _STRIP], cosines[first : first + _STRIP] = top.indices.numpy(), top.values.numpy()
    return found, cosines


def _compare(grey: NDArray[np.uint8], pairs: NDArray[np.int64]) -> NDArray[np.float32]:
    found = np.empty(len(pairs), np.float32)
    for first in range(0, len(pairs), _PAIRS):
        some = pairs[first : first + _PAIRS]
        still, moving = (torch.from_numpy(grey[some[:, side]]).float() for side in (0, 1))
        found[first : first + _PAIRS] = residuals(still, moving).numpy()
    return found


def _surroundings(left: NDArray[np.float32], pairs: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the residual to other pictures around each pair, from the `(N, candidates)` residuals of the pictures."""
    around = left.max(axis=1) if left.shape[1] == CANDIDATES else np.ones(len(left), np.float32)
    # In a group of more copies than candidates only copies surround a picture.
    around = np.maximum(around, np.quantile(around, 0.1))
    return np.asarray(np.minimum(around[pairs[:, 0]], around[pairs[:, 1]]), np.float32)


def _same(kind: str, digests: Sequence[bytes]) -> list[Group]:
    rows: dict[bytes, list[int]] = defaultdict(list)
    for row, digest in enumerate(digests):
        rows[digest].append(row)
    return [Group(kind, tuple(members)) for members in rows.values() if len(members) > 1]


def _near_groups(pairs: Sequence[tuple[int, int, float]]) -> list[Group]:
    """Return connected pictures as groups."""
    parent: dict[int, int] = {}

    def root(row: int) -> int:
        while parent.setdefault(row, row) != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for a, b, _ in pairs:
        parent[root(a)] = root(b)
    rows: dict[int, list[int]] = defaultdict(list)
    worst: dict[int, float] = defaultdict(float)
    for row in sorted(parent):
        rows[root(row)].append(row)
    for a, _, residual in pairs:
        worst[root(a)] = max(worst[root(a)], residual)
    return [Group("near", tuple(members), worst[top]) for top, members in rows.items()]
