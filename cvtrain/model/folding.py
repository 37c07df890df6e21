"""Put trained weights into a network for other channels or other classes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cvtrain.core.anatomy import classifier, first_convolution
from cvtrain.core.weights import all_finite, differences
from cvtrain.errors import ConfigError, WeightsError
from cvtrain.model.head import MLPHead

if TYPE_CHECKING:
    from cvtrain.model.pretrained import Pretrained

log = logging.getLogger("cvtrain")

AUXILIARY = ("aux1", "aux2", "AuxLogits")
"""Classifiers that GoogLeNet and Inception v3 have in the middle, for their own training only."""
COUNTER = "num_batches_tracked"
"""Of batch norm; files from before torch 0.4.1 lack it, and nothing here depends on it."""


def fold(weight: Tensor, channels: int) -> Tensor:
    """Fit a convolution's weight to pictures with another number of channels.

    Its response to a picture whose channels are repeated in turn, or which is the same in all channels, stays as it
    was: what is more than before is shared evenly, what is fewer is summed.

    Args:
        weight: `(O, M, kh, kw)`.
        channels: N.

    Returns:
        `(O, N, kh, kw)`.
    """
    held = weight.shape[1]
    if channels < held:
        return torch.stack([weight[:, i::channels].sum(dim=1) for i in range(channels)], dim=1)
    source = torch.arange(channels) % held
    sharing = torch.bincount(source)[source]
    return weight[:, source] / sharing.view(1, -1, 1, 1)


def fold_statistics(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return the mean or the deviation of each of `channels`: repeated in turn, or averaged over those now summed."""
    held = len(values)
    if channels < held:
        return tuple(fmean(values[i::channels]) for i in range(channels))
    return tuple(values[i % held] for i in range(channels))


def transfer(model: nn.Module, weights: Pretrained, shape: tuple[int, int, int], class_names: Sequence[str]) -> None:
    """Load trained weights into `model`, by name.

    Convolutions that take the picture are folded where the channels differ, and the classifier stays as it is where
    the classes differ; the log says so.

    Args:
        model: In place.
        weights: With their tensors.
        shape: Channels, height and width of the input.
        class_names: The data's, in the order of the outputs.

    Raises:
        WeightsError: Anything else differs, or a value is not finite.
    """
    own = model.state_dict()
    tensors = _without_wrapper(weights.state, own)
    tensors = {name: t for name, t in tensors.items() if name in own or name.partition(".")[0] not in AUXILIARY}
    tensors |= {name: t for name, t in own.items() if name.endswith(COUNTER) and name not in tensors}
    if not all_finite(tensors):
        raise WeightsError(f"pretrained={weights.source} holds values that are not finite. Use other weights.")
    tensors = _folded(model, tensors, own, shape[0])
    other_classes = weights.class_names is not None and weights.class_names != list(class_names)
    if other_classes or differences(own, tensors):
        tensors = _with_own_head(model, weights, tensors, shape, class_names)
    else:
        log.info("pretrained: the classifier is taken, too: %d classes, as here", len(class_names))
    found = differences(own, tensors)
    if found:
        size = "" if weights.img_size in (None, shape[1]) else f" and img_size={weights.img_size}"
        raise WeightsError(
            f"pretrained={weights.source} does not fit this model, {len(found)} differences: {'; '.join(found[:5])}.\n"
            f"Use the model= that it was trained with, the same settings below model.{size}."
        )
    model.load_state_dict(tensors)


def _without_wrapper(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without what a wrapper has put before all names, such as `module.` or `model.`."""
    plain = dict(tensors)
    while plain and not own.keys() & plain.keys():
        wrappers = {name.partition(".")[0] for name in plain}
        if len(wrappers) > 1 or not all("." in name for name in plain):
            break
        plain = {name.partition(".")[2]: tensor for name, tensor in plain.items()}
    return plain


def _folded(
    model: nn.Module, tensors: dict[str, Tensor], own: Mapping[str, Tensor], channels: int
) -> dict[str, Tensor]:
    try:
        path, _ = first_convolution(model)
    except ConfigError:
        return tensors
    first = tensors.get(f"{path}.weight")
    if first is None or first.ndim != 4 or first.shape[1] == channels:
        return tensors
    # Networks with parallel branches have several convolutions that take the picture.
    taking = [
        name
        for name, tensor in tensors.items()
        if name in own
        and tensor.ndim == 4
        and own[name].shape == (tensor.shape[0], channels, *tensor.shape[2:])
        and tensor.shape[1] == first.shape[1]
    ]
    if type(model.get_submodule(path)).forward is not nn.Conv2d.forward:
        log.warning(
            "pretrained: %s is a %s, which scales its weights anew in each step: its response will not be what it was",
            *(path, type(model.get_submodule(path)).__name__),
        )
    log.info(
        "pretrained: %s folded from %d channels to %d (%s)",
        *(", ".join(taking) or "nothing", first.shape[1], channels),
        "summed" if channels < first.shape[1] else "repeated and divided",
    )
    return {**tensors, **{name: fold(tensors[name], channels) for name in taking}}


def _with_own_head(
    model: nn.Module,
    weights: Pretrained,
    tensors: dict[str, Tensor],
    shape: tuple[int, int, int],
    class_names: Sequence[str],
) -> dict[str, Tensor]:
    """Return the tensors with the model's own in the place of the classifier, where it is for other classes."""
    own = model.state_dict()
    path = _head_path(model, shape)
    theirs, ours = _below(path, tensors), _below(path, own)
    fits = {name: t.shape for name, t in theirs.items()} == {name: t.shape for name, t in ours.items()}
    if fits and (weights.class_names is None or weights.class_names == list(class_names)):
        return tensors
    last = next(reversed(theirs.values()), None)
    there, here = 0 if last is None else len(last), len(class_names)
    # Such as the second classifier of networks that were distilled.
    others = {
        name
        for name, tensor in tensors.items()
        if there != here and name in own and tensor.shape == (there, *own[name].shape[1:]) and len(own[name]) == here
    }
    log.info(
        "pretrained: the classifier %s starts afresh: %s",
        path,
        f"{there} classes in the weights, {here} here" if there != here else "other classes, or another head",
    )
    kept = {name: t for name, t in tensors.items() if name not in theirs and name not in others}
    return {**kept, **ours, **{name: own[name] for name in others}}


def _head_path(model: nn.Module, shape: tuple[int, int, int]) -> str:
    """Return the path of what gives the logits: a layer, or the head that has taken its place."""
    path = classifier(model, shape)
    above = path.rpartition(".")[0]
    return above if isinstance(model.get_submodule(above), MLPHead) else path


def _below(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{path}.")}
