"""The shipped options of the group `model`, built as a run builds them."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from cvtrain.build import Builder, build_model
from cvtrain.core.anatomy import classifier

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "model"
OPTIONS = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def build(option, num_classes, channels, side, head="linear", **changes):
    node = {**OmegaConf.to_container(OmegaConf.load(FOLDER / f"{option}.yaml")), **changes}
    return build_model(Builder({}, []), node, num_classes, channels, side, head)


def enliven(model, images):
    """Give a fresh network logits of up to 10, with a part of every block in them.

    They are near 0, where differences between two runtimes do not show, and ConvNeXt's blocks begin as identities.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.ones_(parameter)
    last = model.get_submodule(classifier(model, tuple(images.shape[1:])))
    nn.init.normal_(last.weight)
    nn.init.zeros_(last.bias)
    with torch.no_grad():
        last.weight *= 10 / model.eval()(images).abs().max()
    return model


def count(model):
    return sum(p.numel() for p in model.parameters())


def quick_and_slow(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
