"""Fit a network from a library to small pictures, to the data's channels and to short runs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cvtrain.core.anatomy import first_convolution, replace_module
from cvtrain.core.dataflow import Dataflow, Value
from cvtrain.core.modes import evaluating
from cvtrain.errors import ConfigError, Interrupted
from cvtrain.model.size import refusal

log = logging.getLogger("cvtrain")

SMALL_PICTURE = 64
"""Up to this side, in pixels, a stem made for 224 px throws away most of the picture."""
_LONGEST_STEM = 40
"""Operations in which a stem is over: five convolutions with norm and activation, and two pools, are 17."""


def fit_stem(model: nn.Module, in_channels: int, img_size: int, small_stem: bool | str) -> None:
    """Fit the first convolution to the channels and, with the max-pool behind it, to small pictures.

    A stem that reduces the picture 2 to 4 times at once becomes a 3×3 convolution of stride 1 without max-pool, as the
    CIFAR networks of He et al. 2016 have it. Patch embeddings (ViT, ConvNeXt, Swin) stay: their stride is their patch.
    A network without a convolution stays as it is.

    Args:
        model: Changed in place.
        in_channels: Channels of the input.
        img_size: Side of the input in pixels.
        small_stem: Whether to change the stem, where the rest of the network allows it; `auto`: at 64 px and below.
    """
    try:
        path, conv = first_convolution(model)
    except ConfigError:  # patches through a linear layer, which the library makes for the channels
        return
    if conv.in_channels != in_channels:
        conv = _changed(conv, in_channels=in_channels)
        replace_module(model, path, conv)
        tell_channels(in_channels)
    small = img_size <= SMALL_PICTURE if small_stem == "auto" else bool(small_stem)
    if not small or conv.stride[0] == 1 or conv.kernel_size == conv.stride:
        return
    pool = _pool_behind(model, path, (in_channels, img_size, img_size))
    before = {path: conv} | ({} if pool is None else {pool: model.get_submodule(pool)})
    replace_module(model, path, _changed(conv, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)))
    if pool is not None:
        replace_module(model, pool, nn.Identity())
    if refusal(model, (in_channels, img_size, img_size)) is not None:
        for name, module in before.items():  # such as attention whose maps were made for this very size
            replace_module(model, name, module)
        if refusal(model, (in_channels, img_size, img_size)) is None:
            log.info("model: stem left as it is; the rest of the network is made for what it gives")
        return
    log.info("model: 3×3 stem of stride 1%s, for small pictures", "" if pool is None else " without max-pool")


def tell_channels(in_channels: int) -> None:
    """Log that the network was made for another number of channels."""
    log.info("model: first convolution takes %d channel%s", in_channels, "" if in_channels == 1 else "s")


def raise_batch_norm_momentum(model: nn.Module) -> None:
    """Use momentum 0.1 or more: MobileNetV3's 0.01 leaves a run of a few hundred steps with unusable statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.momentum is not None and module.momentum < 0.1:
            module.momentum = 0.1


def _changed(conv: nn.Conv2d, **changes: int | tuple[int, int]) -> nn.Conv2d:
    """Return a copy with other settings and weights to match; a subclass's own ways, such as its padding, stay."""
    changed = copy.deepcopy(conv)
    for name, value in changes.items():
        setattr(changed, name, value)
    shape = (changed.out_channels, changed.in_channels // changed.groups, *changed.kernel_size)
    changed.weight = nn.Parameter(conv.weight.detach().new_empty(shape))
    nn.init.kaiming_normal_(changed.weight, mode="fan_out", nonlinearity="relu")
    return changed


class _Enough(Exception):  # noqa: N818 - no error
    """The stem has been passed."""


class _Beginning(Dataflow):
    """Follows the first operations only, which are over soon even on real pictures."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - whatever `func` returns
        """Call `func` and record what it made.

        Raises:
            _Enough: A stem has fewer operations.
        """
        if len(self.values) > _LONGEST_STEM:
            raise _Enough
        return super().__torch_function__(func, types, args, kwargs)


def _beginning(model: nn.Module, shape: tuple[int, int, int]) -> list[Value]:
    flow = _Beginning()
    first = next(model.parameters())
    handles = [handle for path, module in model.named_modules() if path for handle in flow.watch(path, module)]
    try:
        with evaluating(model), torch.no_grad(), flow:
            images = torch.zeros((1, *shape), device=first.device)
            flow.begin(images)
            model(images)
    except Interrupted:
        raise
    except Exception:  # _Enough, or what a network raises at a size that it does not take
        return flow.values
    finally:
        for handle in handles:
            handle.remove()
    return flow.values


def _pool_behind(model: nn.Module, stem: str, shape: tuple[int, int, int]) -> str | None:
    """Return the path of the pooling that is next to reduce the picture behind the convolution `stem`, if there is one.

    Looked for up to where the way forks, which is where a stem ends.
    """
    for tried in ((shape[0], 224, 224), shape):  # small pictures may not get to the end of a stem
        values = _beginning(model, tried)
        last, passed = 0, False
        for number, value in enumerate(values):
            if value.inputs != [last] or values[last].uses > 1:
                continue
            falls = passed and value.shape[-1] * 3 <= values[last].shape[-1] * 2
            last, passed = number, passed or stem in value.modules
            if falls:
                found = value.modules[:1]
                return found[0] if found and not list(model.get_submodule(found[0]).parameters()) else None
    return None
