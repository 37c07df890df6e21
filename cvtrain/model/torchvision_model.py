"""Any torchvision classifier, fitted to the data's channels, size and classes."""

from __future__ import annotations

from torch import nn

from cvtrain.errors import ConfigError, did_you_mean
from cvtrain.model.fitting import fit_stem, raise_batch_norm_momentum


def torchvision_model(
    num_classes: int, in_channels: int, img_size: int, name: str, small_stem: bool | str = "auto"
) -> nn.Module:
    """Build a torchvision classifier without pretrained weights.

    GoogLeNet and Inception come without their auxiliary classifiers: batch norm does what these were for (Szegedy et
    al., "Rethinking the Inception architecture", CVPR 2016, section 4), and a network has one output everywhere.

    Args:
        num_classes: Outputs of the head.
        in_channels: Channels of the input; another number than 3 gets a new first convolution.
        img_size: Side of the input in pixels.
        name: A name of `torchvision.models.list_models`.
        small_stem: Whether to change the stem (`fit_stem`); `auto`: at 64 px and below.

    Raises:
        ConfigError: Unknown name.
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
    elif name.startswith("maxvit_"):
        kwargs = {"input_size": (img_size, img_size)}
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **kwargs)
    fit_stem(model, in_channels, img_size, small_stem)
    raise_batch_norm_momentum(model)
    return model
