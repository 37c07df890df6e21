"""How a network tells pictures apart: what its last layer gets, in two dimensions."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

FEW = 100
"""Pictures below which t-SNE is not used: it wants about three times its perplexity of 30."""
REDUCED = 50
"""Dimensions that principal components leave before t-SNE, as its authors have it."""


@torch.no_grad()
def penultimate(model: nn.Module, images: Tensor, classifier: str) -> tuple[Tensor, Tensor]:
    """Return what the last layer gets, and the logits.

    Args:
        model: A classifier in evaluation mode.
        images: Its input, float32 `(B, C, H, W)`.
        classifier: Path of its last layer.

    Returns:
        Features float32 `(B, D)`, the mean over places or tokens where there are several, and logits `(B, K)`.
    """
    given: list[Tensor] = []
    handle = model.get_submodule(classifier).register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        logits: Tensor = model(images)
    finally:
        handle.remove()
    features = given[-1].float()
    if features.ndim == 4:
        features = features.mean((2, 3))
    elif features.ndim == 3:
        features = features.mean(1)
    return features.cpu(), logits.float().cpu()


def project(features: NDArray[np.float32], seed: int) -> tuple[NDArray[np.float64], str]:
    """Return `(N, 2)` places of features `(N, D)` in the plane, and by which method: `t-SNE` or `PCA`.

    t-SNE (van der Maaten & Hinton, "Visualizing data using t-SNE", JMLR 2008) keeps neighbours together; distances
    between far clusters and their sizes mean nothing. Below 100 pictures it is the first two principal components.

    Args:
        features: N of 1 or more.
        seed: Of t-SNE.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count, dimensions = features.shape
    if count < FEW or not features.std(0).any():
        kept = min(2, count, dimensions)
        found = np.zeros((count, 2))
        if features.std(0).any():
            found[:, :kept] = PCA(kept, random_state=seed).fit_transform(features.astype(np.float64))
        return found, "PCA"
    if dimensions > REDUCED:
        features = PCA(REDUCED, random_state=seed).fit_transform(features)
    places = TSNE(2, perplexity=30, init="pca", random_state=seed).fit_transform(features)
    return places.astype(np.float64), "t-SNE"
