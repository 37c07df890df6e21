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

    `balanced` is N / (K · n_k), scikit-learn's; `effective` is the inverse of the effective number of samples,
    (1 - β) / (1 - β^n_k) (Cui et al., "Class-balanced loss based on effective number of samples", CVPR 2019,
    arXiv:1901.05555). Where a picture may have several labels, each label is a problem of its own with two classes,
    absent and present; a given weight is then that of presence to absence, PyTorch's `pos_weight`.

    All are scaled to a mean of 1 over the training pictures, not over the classes: so the size of the loss stays, and
    with it the learning rate that suits it.

    Args:
        spec: `none`, `balanced`, `effective`, or a weight above 0 for each class name.
        labels: Of the training set: `(N,)` int64 in 0..K-1, or `(N, K)` of 0 and 1.
        class_names: K names.

    Returns:
        float32 on the CPU, all above 0: `(K,)`, or `(K, 2)` for the absence and the presence of each label; None for
        `none`.

    Raises:
        ConfigError: Unknown or missing class names.
    """
    if spec == "none":
        return None
    counts = class_counts(labels, len(class_names))
    several = labels.ndim == 2
    if several:
        counts = np.stack([len(labels) - counts, counts], axis=-1)
    if isinstance(spec, Mapping):
        given = _given(spec, class_names)
        weights = np.stack([np.ones_like(given), given], axis=-1) if several else given
    else:
        known = np.maximum(counts, 1)  # a class without a picture counts as if it had one
        weights = 1.0 / (known if spec == "balanced" else -np.expm1(known * math.log(BETA)) / (1.0 - BETA))
    weights = weights * counts.sum(-1, keepdims=True) / (counts * weights).sum(-1, keepdims=True)
    return torch.from_numpy(weights).float()


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
