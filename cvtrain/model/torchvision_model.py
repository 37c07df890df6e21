"""Any torchvision classifier, fitted to the data's channels, size and classes."""

from __future__ import annotations

import logging

import torch
from torch import nn

from cvtrain.core.anatomy import first_convolution, replace_module, stem_pool
from cvtrain.errors import ConfigError, did_you_mean

log = logging.getLogger("cvtrain")

SMALL_PICTURE = 64
"""Up to this side, in pixels, a stem made for 224 px throws away most of the picture."""


def torchvision_model(
    num_classes: int, in_channels: int, img_size: int, name: str, small_stem: bool | str = "auto"
) -> nn.Module:
    """Build a torchvision classifier without pretrained weights.

    A stem that reduces the picture 2 to 4 times at once becomes a 3×3 convolution of stride 1 without max-pool, as the
    CIFAR networks of He et al. 2016 have it.

    Args:
        num_classes: Outputs of the head.
        in_channels: Channels of the input; another number than 3 gets a new first convolution.
        img_size: Side of the input in pixels.
        name: A name of `torchvision.models.list_models`.
        small_stem: Whether to change the stem; `auto`: at 64 px and below.

    Raises:
        ConfigError: Unknown name, or a picture too small for this network.
    """
    from torchvision import models  # two seconds that other networks need not wait for

    names = models.list_models(module=models)
    if name not in names:
        raise ConfigError(
            f"model.name={name} is not a torchvision classifier; {did_you_mean(name, names, 'some names')}"
        )
    kwargs: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):
        kwargs = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        kwargs = {"image_size": img_size}
    try:
        model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **kwargs)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"model.name={name} cannot be built at img_size={img_size} ({error}). Choose another img_size."
        ) from error
    _fit_stem(model, in_channels, img_size <= SMALL_PICTURE if small_stem == "auto" else bool(small_stem))
    _raise_batch_norm_momentum(model)
    _check_size(model, name, in_channels, img_size)
    return model


def _fit_stem(model: nn.Module, in_channels: int, small: bool) -> None:
    path, conv = first_convolution(model)
    is_patchify = conv.kernel_size == conv.stride  # ViT, ConvNeXt, Swin: patches, not a stem that subsamples
    shrink = small and conv.stride[0] > 1 and not is_patchify
    if conv.in_channels == in_channels and not shrink:
        return
    changed = nn.Conv2d(
        in_channels,
        conv.out_channels,
        kernel_size=3 if shrink else conv.kernel_size,  # type: ignore[arg-type]
        stride=1 if shrink else conv.stride,  # type: ignore[arg-type]
        padding=1 if shrink else conv.padding,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
    nn.init.kaiming_normal_(changed.weight, mode="fan_out", nonlinearity="relu")
    pool = stem_pool(model) if shrink else None
    replace_module(model, path, changed)
    if shrink:
        log.info("model: 3×3 stem of stride 1%s, for small pictures", "" if pool is None else " without max-pool")
    if pool is not None:
        replace_module(model, pool, nn.Identity())
    if conv.in_channels != in_channels:
        log.info("model: first convolution takes %d channel%s", in_channels, "" if in_channels == 1 else "s")


def _raise_batch_norm_momentum(model: nn.Module) -> None:
    """Use momentum 0.1 or more: MobileNetV3's 0.01 leaves a run of a few hundred steps with unusable statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.momentum is not None and module.momentum < 0.1:
            module.momentum = 0.1


def _check_size(model: nn.Module, name: str, in_channels: int, img_size: int) -> None:
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, in_channels, img_size, img_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"model.name={name} does not take pictures of {img_size} px ({str(error).splitlines()[0]}). Set "
            f"a larger img_size."
        ) from error
    finally:
        model.train(was_training)
