"""A training shared by several processes: what `train` does otherwise then."""

from __future__ import annotations

import logging
import os

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cvtrain.build import Builder, lay_out
from cvtrain.core import distributed
from cvtrain.core.types import DataSets
from cvtrain.engine.run import TrainRun
from cvtrain.errors import ConfigError, DataError

log = logging.getLogger("cvtrain")


def announce(device: torch.device, threads: int | None) -> None:
    """Say how many processes train, and that torchrun keeps each to one CPU thread."""
    world = distributed.world_size()
    if world == 1:
        return
    log.info("processes: %d, this is the first; batch_size counts the pictures of all together", world)
    if device.type == "cpu" and threads is None and os.environ.get("OMP_NUM_THREADS") == "1":
        log.info("processes: OMP_NUM_THREADS is 1, torchrun's default; threads=N gives each process N CPU threads")


def refuse_other_data(name: str, fingerprint: str) -> None:
    """See that all processes have loaded the same pictures and labels.

    Raises:
        DataError: This one has others than the first.
    """
    if distributed.shared(lambda: fingerprint) != fingerprint:
        raise DataError(
            f"data {name}: this process has other files or labels than the first one.\n"
            "Give every machine the same copy, with the same splits."
        )


def with_shared_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with batch norm over the pictures of all processes; names in its state dict stay.

    Raises:
        ConfigError: Several processes, but no GPUs: torch has it for GPUs only.
    """
    if distributed.world_size() == 1:
        return model
    if device.type != "cuda":
        raise ConfigError(
            f"sync_batchnorm=true with device={device.type}: torch has it for GPUs only. Use sync_batchnorm=false."
        )
    refuse_more_than_batch_norm(model)
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return converted


def refuse_more_than_batch_norm(model: nn.Module) -> None:
    """See that torch's conversion keeps what the network computes.

    Raises:
        ConfigError: A batch norm does more than that, as timm's with an activation inside; torch would leave that out.
    """
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and type(module).forward is not _BatchNorm.forward:
            raise ConfigError(
                f"sync_batchnorm=true: {path} is a {type(module).__name__}, of which torch would keep the batch norm "
                "and nothing else. Use sync_batchnorm=false."
            )


def with_batch_norm_alone(model: nn.Module, builder: Builder, sets: DataSets) -> nn.Module:
    """Return the model as it was before `with_shared_batch_norm`, for exporters that know no such batch norm."""
    if not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        return model
    plain = builder.model(sets)
    for regularizer in builder.build_each("regularizer").values():
        regularizer.attach(plain, sets.preprocess.shape)
    plain.load_state_dict(model.state_dict())
    return lay_out(plain, next(model.parameters()).device, builder.config["channels_last"])


def go_on_alone(run: TrainRun, builder: Builder, sets: DataSets) -> bool:
    """Part from the other processes at the end of the training; return whether this is the one that goes on.

    It compresses, exports and reports, with all of the training set for itself.
    """
    goes_on, parting = distributed.main(), distributed.world_size() > 1
    distributed.leave()
    if parting and goes_on:
        run.wrapped = None
        run.loader = builder.loader(sets, run.device, getattr(run.augmentation, "crop", None))
    return goes_on
