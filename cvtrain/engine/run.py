"""A run is one dataclass of small parts, each built from one config group; parts get values, never the config."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cvtrain.core import distributed
from cvtrain.core.phases import Phase
from cvtrain.core.types import Batch, Preprocess
from cvtrain.engine.parts import (
    Augmentation,
    Averaging,
    Display,
    Distillation,
    Finetune,
    Loader,
    Precision,
    Resizing,
    Schedule,
    Silent,
    Task,
    Tracker,
)
from cvtrain.engine.state import TrainState
from cvtrain.engine.timing import NoTimer
from cvtrain.resizing import shrunk
from cvtrain.scheduler import Clock

if TYPE_CHECKING:
    from cvtrain.engine.checkpoint import CheckpointStore
    from cvtrain.engine.monitor import Monitor
    from cvtrain.engine.signals import StopRequest


@dataclass(frozen=True)
class TrainOptions:
    """Plain settings of the loop; names and units as in configs/train.yaml."""

    epochs: int
    seed: int
    base_lr: float
    grad_accum_steps: int = 1
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    on_nan: str = "stop"
    on_oom: str = "stop"
    log_every_steps: int = 50
    channels_last: bool = True
    save_every_steps: int | None = None
    limit_train_batches: int | None = None
    limit_eval_batches: int | None = None
    max_seconds: float | None = None
    rank: int = 0


@dataclass
class TrainRun:
    """All parts of a training run."""

    options: TrainOptions
    device: torch.device
    model: nn.Module
    preprocess: Preprocess
    loader: Loader
    augmentation: Augmentation
    resizing: Resizing
    task: Task
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    precision: Precision
    finetune: Finetune
    averaging: Averaging
    distillation: Distillation
    monitor: Monitor
    checkpoints: CheckpointStore
    tracker: Tracker
    stop: StopRequest
    state: TrainState
    display: Display = field(default_factory=Silent)
    timer: NoTimer = field(default_factory=NoTimer)
    wrapped: nn.Module | None = None

    @property
    def train_model(self) -> nn.Module:
        """Return what the loss runs through: the model, or the model compiled or shared among processes."""
        return self.model if self.wrapped is None else self.wrapped

    @property
    def deployed(self) -> nn.Module:
        """Return the model that is evaluated and deployed: the averaged one where there is one."""
        return self.averaging.model() or self.model

    def gradient_sync(self, last: bool) -> AbstractContextManager[None]:
        """Return the context of a micro-batch: gradients are shared among processes only with the last of a step."""
        shared = self.wrapped if isinstance(self.wrapped, DistributedDataParallel) else None
        return nullcontext() if shared is None or last else shared.no_sync()

    def share(self) -> None:
        """Have the gradients averaged over all processes; again whenever other parameters train than before.

        It starts all processes from the weights of the first.
        """
        if distributed.world_size() > 1:
            inner = self.wrapped.module if isinstance(self.wrapped, DistributedDataParallel) else self.train_model
            # On a CPU sums are the same to the bit after a resume only if gradients stay in the same order, which they
            # do where unused parameters are looked for.
            fixed = self.device.type == "cpu"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 has another name for the first argument
                # The loop averages the buffers itself, so that they are equal after every step, not only during one.
                self.wrapped = DistributedDataParallel(inner, broadcast_buffers=False, find_unused_parameters=fixed)

    @property
    def batches_per_epoch(self) -> int:
        """Return micro-batches in an epoch."""
        limit = self.options.limit_train_batches
        return self.loader.steps_per_epoch if limit is None else min(limit, self.loader.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Return optimizer steps in an epoch."""
        return -(-self.batches_per_epoch // self.options.grad_accum_steps)

    def augmented(self, batch: Batch, epoch: int) -> Tensor:
        """Augment a raw batch; uint8 `(B, C, S, S)`, S being the epoch's size."""
        size, images = self.resizing.phase(epoch).img_size, batch.images
        if not batch.cropped:
            images = shrunk(images, round(images.shape[-1] * size / self.preprocess.img_size))
        return self.augmentation.samples(images, batch.indices, self.options.seed, epoch, size, batch.cropped)

    def train_images(self, batch: Batch, epoch: int) -> Tensor:
        """Augment and normalise a raw batch; float32 `(B, C, S, S)` in the run's memory format."""
        return self.in_memory_format(self.preprocess.normalize(self.augmented(batch, epoch)))

    def cycle(self, epoch: int) -> Phase:
        """Return the learning-rate cycle of `epoch`: a phase of the unfreezing, or of the pictures' size."""
        return self.finetune.cycle(epoch) or self.resizing.phase(epoch)

    def clock(self, step: int) -> tuple[float, Clock]:
        """Return the base learning rate and the schedule's time of an optimizer step: both are the phase's own."""
        phase = self.cycle(step // self.steps_per_epoch)
        base_lr = self.options.base_lr if phase.lr is None else phase.lr
        return base_lr, Clock(step - phase.first * self.steps_per_epoch, self.steps_per_epoch, phase.epochs)

    def eval_images(self, batch: Batch) -> Tensor:
        """Crop and normalise a raw batch; never augmented."""
        return self.in_memory_format(self.preprocess(batch.images))

    def in_memory_format(self, images: Tensor) -> Tensor:
        """Lay images out as the convolutions want them."""
        return (
            images.contiguous(memory_format=torch.channels_last) if self.options.channels_last else images.contiguous()
        )
