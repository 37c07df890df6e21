"""A trained model as it was shipped: weights, class names and preprocessing from one file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cvtrain import runs
from cvtrain.audit import audit
from cvtrain.build import Builder, build_model, lay_out
from cvtrain.core import weights
from cvtrain.core.channel_plan import apply_plan
from cvtrain.core.types import Preprocess
from cvtrain.errors import ConfigError, WeightsError
from cvtrain.runtime.prepare import MULTILABEL, temperature


@dataclass(frozen=True)
class Deployed:
    """A model ready to predict.

    Attributes:
        model: In eval mode, on its device.
        class_names: K names.
        preprocess: How a picture becomes its input.
        device: Where it is.
        path: Its file.
        multilabel: Whether each class is decided by itself, at a probability (sigmoid) of 0.5.
        metadata: All text that the file carries.
        temperature: What logits are divided by before they become probabilities.
    """

    model: nn.Module
    class_names: list[str]
    preprocess: Preprocess
    device: torch.device
    path: Path
    multilabel: bool
    metadata: dict[str, str]
    temperature: float = 1.0


def load(config: dict[str, Any], trusted: list[str]) -> Deployed:
    """Load the model that `run=` or `weights=` names.

    Raises:
        ConfigError: Neither or both are given, or the file's `_target_` is not allowed.
        WeightsError: The file is missing, damaged or not from cvtrain.
    """
    return load_file(_path(config), Builder(config, trusted).device(), trusted)


def load_file(path: Path, device: torch.device, trusted: list[str], channels_last: bool = True) -> Deployed:
    """Load the model of one model.safetensors.

    Raises:
        ConfigError: The file's `_target_` is not allowed.
        WeightsError: The file is missing, damaged or not from cvtrain.
    """
    metadata = weights.read(path)[1]
    names, node = (weights.parse_metadata(metadata, key) for key in ("class_names", "model"))
    prep = weights.parse_preprocess(metadata, path)
    if not isinstance(names, list) or not isinstance(node, dict):
        raise WeightsError(f"{path} has metadata of another kind. Use weights/model.safetensors of a run.")
    audit({"model": node, "trusted": trusted}, trusted)  # a file's config is no more trusted than any other
    head = metadata.get("head", "linear")
    model = build_model(Builder({"model": node}, trusted), node, len(names), prep.channels, prep.img_size, head)
    if "channel_plan" in metadata:
        apply_plan(model, weights.parse_metadata(metadata, "channel_plan"))
    weights.load_into(model, path)
    lay_out(model, device, channels_last).eval()
    multilabel, scale = metadata.get("task") == MULTILABEL, temperature(metadata, path)
    return Deployed(model, [str(name) for name in names], prep, device, path, multilabel, metadata, scale)


def run_config(folder: Path) -> dict[str, Any]:
    """Return the resolved config of a run.

    Raises:
        ConfigError: Not a run folder.
    """
    from omegaconf import OmegaConf

    path = folder / runs.ARGS
    if not path.is_file():
        raise ConfigError(
            f"run={folder} is not a run folder: it has no {runs.ARGS}. Use the folder that a run printed."
        )
    try:
        container = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # whatever YAML and OmegaConf raise for a torn file
        raise ConfigError(f"{path} does not parse: {' '.join(str(error).split())}") from error
    if not isinstance(container, dict):
        raise ConfigError(f"{path} is not a mapping.")
    plain: dict[str, Any] = json.loads(json.dumps(container))
    return plain


def _path(config: dict[str, Any]) -> Path:
    run, file = config.get("run"), config.get("weights")
    if (run is None) == (file is None):
        raise ConfigError(
            "give one of run=FOLDER (the folder that a run printed) and weights=FILE (a model.safetensors)."
        )
    if run is None:
        return Path(str(file))
    path = Path(str(run)) / "weights" / "model.safetensors"
    if not path.is_file():
        raise WeightsError(
            f"run={run} has no weights/model.safetensors. Let it finish: the same command with resume=auto."
        )
    return path
