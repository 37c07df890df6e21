"""The teacher of a run: found, loaded and checked before the first epoch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from cvtrain import runs
from cvtrain.build import Builder
from cvtrain.command import deployed
from cvtrain.core.complexity import count_params
from cvtrain.core.types import DataSets
from cvtrain.distillation import Teacher
from cvtrain.engine.run import TrainRun
from cvtrain.errors import ConfigError

log = logging.getLogger("cvtrain")


def load_teacher(builder: Builder, sets: DataSets, device: torch.device, folder: Path) -> Teacher | None:
    """Load what `distillation.teacher` names; None when it names nothing.

    Args:
        builder: Of the run.
        sets: The run's data.
        device: The run's device.
        folder: The run's folder.

    Raises:
        ConfigError: The teacher does not fit the run's task, classes or channels, or is this run itself.
        WeightsError: It is missing, damaged or not from cvtrain.
    """
    given = builder.config["distillation"].get("teacher")
    if given is None:
        return None
    if Path(str(given)).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"distillation.teacher={given} is this run itself; name another one, or start this one with resume=none."
        )
    path, digest = runs.shipped_weights(Path(str(given)), "distillation.teacher")
    shipped = deployed.load_file(path, device, list(builder.trusted), builder.config["channels_last"])
    if shipped.multilabel != sets.multilabel:
        kinds = ["one class", "several labels"]
        raise ConfigError(
            f"distillation.teacher={given} gives a picture {kinds[shipped.multilabel]}, this run's data "
            f"{kinds[sets.multilabel]}; choose a teacher trained with the same task=."
        )
    teacher = Teacher(shipped.model, shipped.class_names, shipped.preprocess, sets.class_names, sets.preprocess, digest)
    parameters = f"{count_params(shipped.model):,}"
    log.info("distillation: teacher %s, SHA-256 %s, %s parameters", path, digest, parameters)
    return teacher


def refuse_another_teacher(run: TrainRun, config: dict[str, Any]) -> None:
    """See that a restored run goes on with the very teacher it had, unless `resume_allow` names it.

    Raises:
        ConfigError: The teacher's weights are others.
    """
    before, now = run.checkpoints.origin.get("teacher_sha256"), run.distillation.teacher_sha256
    if before == now:
        return
    given = config["distillation"].get("teacher")
    if not {"distillation", "distillation.teacher"} & set(config["resume_allow"]):
        raise ConfigError(
            f"distillation.teacher={given} has other weights than when this run began: SHA-256 {now}, not {before}.\n"
            "Bring that file back, start a new run with resume=none, or add resume_allow=[distillation.teacher]."
        )
    log.warning("distillation: goes on with another teacher: SHA-256 %s, not %s", now, before)
