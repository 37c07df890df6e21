"""Any timm classifier, fitted to the data's channels, size and classes; the extra `timm`."""

from __future__ import annotations

from typing import Any

from torch import nn

from cvtrain.core.extras import import_extra
from cvtrain.errors import ConfigError, did_you_mean
from cvtrain.model.fitting import fit_stem, raise_batch_norm_momentum, tell_channels


def timm_model(
    num_classes: int, in_channels: int, img_size: int, name: str, small_stem: bool | str = "auto"
) -> nn.Module:
    """Build a timm classifier without pretrained weights.

    Args:
        num_classes: Outputs of the head.
        in_channels: Channels of the input.
        img_size: Side of the input in pixels; what positions or windows belong to is made for it.
        name: A name of `timm.list_models`, with or without the tag of its weights.
        small_stem: Whether to change the stem (`fit_stem`); `auto`: at 64 px and below.

    Raises:
        ConfigError: timm is not installed, or an unknown name or tag.
    """
    timm = import_timm(name)
    if not timm.is_model(name):  # this also keeps out hf-hub: and local-dir:, from where timm would read a config
        names = timm.list_models()
        raise ConfigError(f"model.name={name} is not a timm classifier; {did_you_mean(name, names, 'some names')}")
    tag, tags = name.partition(".")[2], timm.list_pretrained(name.partition(".")[0] + ".*")
    if tag and name not in tags:
        raise ConfigError(f"model.name={name}: timm has no such weights; {did_you_mean(name, tags, 'it has')}")
    designed = timm.get_pretrained_cfg(name)
    settings = {"num_classes": num_classes, "in_chans": in_channels}
    if designed.fixed_input_size:
        settings["img_size"] = img_size
    model: nn.Module = timm.create_model(name, **settings)
    if in_channels != designed.input_size[0]:
        tell_channels(in_channels)
    fit_stem(model, in_channels, img_size, small_stem)
    raise_batch_norm_momentum(model)
    return model


def import_timm(name: str) -> Any:  # noqa: ANN401 - a module without types
    """Return the package timm, wanted for the model `name`; raise ConfigError where it is not installed."""
    return import_extra("timm", f"model=timm model.name={name}", "timm")
