"""What augmentations do to a few pictures: the operations one by one, the mixing at several strengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.aug import Augmentation
from cvtrain.aug.mixing import CutMix, mix_up
from cvtrain.catalog import config_folder
from cvtrain.core.random import generator
from cvtrain.core.types import SampleTransform

Pictures = NDArray[np.uint8]

LAMBDAS = tuple(float(value) for value in np.linspace(1, 0, 9))
ALPHAS = (0.1, 0.3, 1.0, 3.0)


def shipped_operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield name, preset and config node of every operation in the shipped presets, each kind once."""
    seen: set[str] = set()
    for path in sorted((config_folder() / "aug").glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for name, node in (content.get("sample") or {}).items():
            target = (node or {}).get("_target_")
            if target is not None and target not in seen:
                seen.add(target)
                yield str(name), path.stem, node


def draws(op: SampleTransform, name: str, images: Tensor, indices: NDArray[np.int64], **key: int) -> list[Pictures]:
    """Return what `op` makes of the same pictures in several epochs.

    Args:
        op: One operation.
        name: The key of its randomness.
        images: uint8 `(B, C, H, W)`.
        indices: `(B,)` positions in the training set.
        key: `seed`, `epochs` (how many draws) and `img_size`.

    Returns:
        For each draw uint8 `(B, img_size, img_size, C)`.
    """
    single = Augmentation({name: op})
    return [
        channels_last(single.samples(images.clone(), indices, key["seed"], epoch, key["img_size"]))
        for epoch in range(key["epochs"])
    ]


def mixup_sweep(images: Tensor) -> list[Pictures]:
    """Blend pairs of uint8 `(B, C, H, W)`, 0 with 1 and so on; return `(B / 2, H, W, C)` for each of `LAMBDAS`."""
    first, second = images[0::2].float(), images[1::2].float()
    both = torch.cat([first, second])
    partner = torch.cat([torch.arange(len(first), len(both)), torch.arange(len(first))])
    targets = torch.zeros(len(both), 1)
    return [
        channels_last(mix_up(both, targets, partner, lam)[0][: len(first)].round().to(torch.uint8)) for lam in LAMBDAS
    ]


def cutmix_sweep(images: Tensor, seed: int, count: int) -> Mapping[float, tuple[Pictures, list[float]]]:
    """Return for each of `ALPHAS` `count` mixtures of the two pictures of uint8 `(2, C, H, W)` with their λ."""
    found = {}
    for alpha in ALPHAS:
        op = CutMix(alpha)
        mixed: list[Pictures] = []
        shares: list[float] = []
        # The pair is swapped by half of the permutations; the others would paste a picture into itself.
        for number in range(10 * count):
            targets = torch.eye(2)
            result, weights = op(images.float(), targets, generator(seed, "inspect", number))
            if len(mixed) < count and not torch.equal(weights, targets):
                mixed.append(channels_last(result[:1].to(torch.uint8))[0])
                shares.append(float(weights[0, 0]))
        found[alpha] = (np.stack(mixed), shares)
    return found


def channels_last(images: Tensor) -> Pictures:
    """Return `(B, C, H, W)` as a NumPy `(B, H, W, C)`."""
    pictures: Pictures = images.permute(0, 2, 3, 1).cpu().numpy()
    return pictures
