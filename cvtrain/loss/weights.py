"""How much each class counts in the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.core.metrics import class_counts
from cvtrain.errors import ConfigError, did_you_mean

BETA = 0.9999
"""Cui et al.'s β: classes of some ten thousand pictures and more count as equally well known."""


def class_weights(spec: str | Mapping[Any, float], labels: NDArray[Any], class_names: Sequence[str]) -> Tensor | None:
    """Return the weight of each class in the loss.

    One label a picture: `balanced` is N / (K · n_k), scikit-learn's; `effective` is the inverse of the effective
    number of samples, (1 - β) / (1 - β^n_k) (Cui et al., "Class-balanced loss based on effective number of samples",
    CVPR 2019, arXiv:1901.05555). All, also given ones, are scaled to a mean of 1 over the training pictures, not over
    the classes: so the size of the loss stays, and with it the learning rate that suits it.

    Several labels: the weight of a label's presence against its absence; `balanced` is (N - n_k) / n_k, `effective` the
    same ratio of effective numbers, and given weights are taken as they are.

    Args:
        spec: `none`, `balanced`, `effective`, or a weight above 0 for each class name.
        labels: Of the training set: `(N,)` int64 in 0..K-1, or `(N, K)` of 0 and 1.
        class_names: K names.

    Returns:
        `(K,)` float32 on the CPU, all above 0; None for `none`.

    Raises:
        ConfigError: Unknown or missing class names.
    """
    if spec == "none":
        return None
    counts = class_counts(labels, len(class_names))
    absent = len(labels) - counts
    if isinstance(spec, Mapping):
        weights = _given(spec, class_names)
    elif labels.ndim == 2:
        weights = _known(absent, spec) / _known(counts, spec)
    else:
        weights = 1.0 / _known(counts, spec)
    if labels.ndim == 1:
        weights = weights * len(labels) / (counts @ weights)
    return torch.from_numpy(weights).float()


def _known(counts: NDArray[np.int64], spec: str) -> NDArray[np.float64]:
    """Return how many pictures `counts` (K,) are worth; a class without one counts as if it had one."""
    counts = np.maximum(counts, 1)
    if spec == "balanced":
        return counts.astype(np.float64)
    effective: NDArray[np.float64] = -np.expm1(counts * math.log(BETA)) / (1.0 - BETA)
    return effective


def _given(spec: Mapping[Any, float], class_names: Sequence[str]) -> NDArray[np.float64]:
    by_name = {str(name): weight for name, weight in spec.items()}
    for name in by_name:
        if name not in class_names:
            raise ConfigError(
                f"class_weights names {name!r}, which is no class of this data; "
                f"{did_you_mean(name, class_names, 'classes')}"
            )
    missing = [name for name in class_names if name not in by_name]
    if missing:
        raise ConfigError(
            f"class_weights leaves out {len(missing)} of {len(class_names)} classes: {', '.join(missing[:8])}"
            f"{', …' if len(missing) > 8 else ''}.\nGive every class a weight, 1 for an ordinary one."
        )
    return np.array([by_name[name] for name in class_names], dtype=np.float64)
