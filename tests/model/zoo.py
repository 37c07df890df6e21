"""The shipped options of the group `model`, built as a run builds them."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cvtrain.build import Builder, build_model

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "model"
OPTIONS = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def build(option, num_classes, channels, side, head="linear", **changes):
    node = {**OmegaConf.to_container(OmegaConf.load(FOLDER / f"{option}.yaml")), **changes}
    return build_model(Builder({}, []), node, num_classes, channels, side, head)


def count(model):
    return sum(p.numel() for p in model.parameters())


def quick_and_slow(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
