"""`cvtrain export run=FOLDER | weights=FILE export=[…]`: write a trained model in other formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvtrain import runs
from cvtrain.build import Builder
from cvtrain.command import deployed
from cvtrain.command.artifacts import Subject, make_and_prove
from cvtrain.command.finished import extend, run_of, told
from cvtrain.command.untrained import Untrained
from cvtrain.core import weights
from cvtrain.core.random import generator
from cvtrain.errors import ConfigError
from cvtrain.evaluation import EvaluationSet
from cvtrain.report.console import attach_log, make_console

PICTURES, BATCH = 256, 32
"""Random pictures that a model without its data is judged on, and how many at once."""


def run(config: dict[str, Any], trusted: list[str]) -> int:
    """Export, prove all artifacts in the folder, and print table and folder; return the exit code.

    Raises:
        ConfigError: There is nothing to export, or nothing to do.
    """
    if (config["run"] is None) == (config["weights"] is None):
        raise ConfigError("give one of run=FOLDER (the folder that a run printed) and weights=FILE (a .safetensors).")
    if not config["export"]:
        raise ConfigError("export=none: there is nothing to do; give export=[onnx] or other formats.")
    if config["run"] is not None:
        return extend(config, trusted)
    file = Path(str(config["weights"]))
    folder = run_of(file)
    return _alone(config, trusted, file) if folder is None else extend({**config, "run": folder}, trusted, file)


def _alone(config: dict[str, Any], trusted: list[str], file: Path) -> int:
    """Export a model that has no run, and so no data: proved on random pictures, whose labels are its own answers."""
    console = make_console(bool(config["json"]))
    attach_log(console)
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    shipped = deployed.load_file(file, torch.device("cpu"), trusted, channels_last=False)
    folder = runs.create_folder(Path(str(config["output_dir"])) / f"export_{file.stem}")
    (folder / "weights").mkdir()
    weights.save_weights(shipped.model, folder / "weights" / "model.safetensors", shipped.metadata)
    builder = Builder({**config, "compression": {}}, trusted)
    subject = Subject(
        model=shipped.model,
        example=torch.zeros(1, *shipped.preprocess.shape),
        folder=folder,
        metadata=shipped.metadata,
        training=Untrained(shipped.preprocess.shape, len(shipped.class_names)),
        evaluation=_random_pictures(shipped),
        pictures=f"{PICTURES} random pictures labelled by the model itself",
    )
    proved = make_and_prove(builder, subject)
    proved.show(console, torch.get_num_threads())
    return told(proved, config, folder)


def _random_pictures(shipped: deployed.Deployed) -> EvaluationSet:
    prepared = shipped.preprocess
    shape = (BATCH, prepared.channels, prepared.resize, prepared.resize)

    def decide(logits: Tensor) -> Tensor:
        return (logits >= 0).to(torch.uint8) if shipped.multilabel else logits.argmax(1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        draw = generator(0, "export")
        for _ in range(PICTURES // BATCH):
            images = torch.from_numpy(draw.integers(0, 256, shape, dtype=np.uint8))
            with torch.inference_mode():
                yield images, decide(shipped.model(prepared(images)))

    return EvaluationSet(batches, shipped.class_names, decide)
