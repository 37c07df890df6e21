"""A run is one dataclass of small parts, each built from one config group; parts get values, never the config."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cvtrain.core import distributed
from cvtrain.core.types import Batch, Preprocess
from cvtrain.engine.timing import NoTimer
from cvtrain.resizing import shrunk
from cvtrain.scheduler import Clock

if TYPE_CHECKING:
    from cvtrain.engine.checkpoint import CheckpointStore
    from cvtrain.engine.monitor import Monitor
    from cvtrain.engine.signals import StopRequest


class Loader(Protocol):
    """Where batches come from; uint8 pictures already on the device."""

    steps_per_epoch: int

    def train_batches(self, epoch: int, start: int = 0, img_size: int | None = None) -> Generator[Batch, None, None]:
        """Yield the epoch's batches in their seeded order, from batch number `start` on.

        Pictures that are decoded as they are read may come cropped at random to `img_size`; None means whole.
        """
        ...

    def batch_total(self, number: int) -> int:
        """Return how many samples an epoch's training batch `number` has over all processes."""
        ...

    def eval_batches(self, split: str, *, limit: int | None = None) -> Generator[Batch, None, None]:
        """Yield `val` or `test` once, in order, or what one process by itself sees of it in `limit` batches."""
        ...

    def names(self, indices: NDArray[np.int64]) -> list[str]:
        """Return what the training pictures are called."""
        ...


class Augmentation(Protocol):
    """Turns raw training batches into what the model trains on."""

    batch: Mapping[str, Any]
    """The operations that mix a batch, by name; empty when there is none."""

    def samples(
        self,
        images: Tensor,
        indices: NDArray[np.int64],
        seed: int,
        epoch: int,
        img_size: int,
        cropped: bool = False,
    ) -> Tensor:
        """Map uint8 `(B, C, R, R)` to uint8 `(B, C, S, S)`."""
        ...

    def mix(self, images: Tensor, targets: Tensor, seed: int, step: int, rank: int) -> tuple[Tensor, Tensor]:
        """Mix the samples of a batch and their `(B, K)` targets."""
        ...


class Metrics(Protocol):
    """Accumulates evaluation results on the device."""

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        ...

    def compute(self) -> dict[str, float]:
        """Return the values by name."""
        ...

    def right(self) -> tuple[int, int]:
        """Return how many pictures were answered right, and how many there are."""
        ...

    def by_class(self) -> dict[str, NDArray[Any]]:
        """Return `support`, `hits`, `precision`, `recall`, `f1` and more of each class, `(K,)`."""
        ...


class Task(Protocol):
    """What the model is for."""

    multilabel: bool
    """Whether a picture may have several labels."""

    def encode(self, targets: Tensor) -> Tensor:
        """Turn raw targets into what mixing and the loss work on."""
        ...

    def decide(self, logits: Tensor) -> Tensor:
        """Turn logits `(B, K)` into answers of the raw targets' shape."""
        ...

    def losses(self, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the objective's terms, `loss` among them."""
        ...

    def metrics(self, device: torch.device) -> Metrics:
        """Return an empty accumulator."""
        ...


class Precision(Protocol):
    """Number formats of the step."""

    def setup(self, device: torch.device, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
        """Settle the format; `loss` runs a model on one real batch, for a probe."""
        ...

    def autocast(self) -> Any:  # noqa: ANN401 - any context manager
        """Return the forward pass's context."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        ...

    def clip(self, optimizer: torch.optim.Optimizer, norm: float | None, value: float | None) -> list[Tensor]:
        """Make the gradients ready for the step; return norms of their parts before they were clipped by norm."""
        ...

    def step(self, optimizer: torch.optim.Optimizer, halt: Tensor) -> None:
        """Take the optimizer's step, unless `halt`, a float32 scalar on the device, is 1."""
        ...

    def check(self) -> None:
        """Read back whether the format still works; waits for the device."""
        ...

    def state(self) -> dict[str, object]:
        """Return what a checkpoint keeps."""
        ...

    def load_state(self, state: dict[str, object]) -> None:
        """Take it back."""
        ...


class Schedule(Protocol):
    """Learning rate as a function of the step."""

    def lr(self, base_lr: float, clock: Any) -> float:  # noqa: ANN401 - scheduler.Clock, a sibling's type
        """Return the rate of the step about to be taken."""
        ...

    def end_epoch(self, improved: bool) -> None:
        """Hear the epoch's result."""
        ...

    def begin_phase(self) -> None:
        """Hear that another phase begins."""
        ...

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        ...

    def load_state(self, state: dict[str, float]) -> None:
        """Take it back."""
        ...


class Cycle(Protocol):
    """Epochs over which the schedule runs once."""

    @property
    def first(self) -> int:
        """Return its first epoch."""
        ...

    @property
    def epochs(self) -> int:
        """Return how many epochs it has."""
        ...

    @property
    def lr(self) -> float | None:
        """Return the base learning rate; None means the run's."""
        ...


class Phase(Cycle, Protocol):
    """Epochs in which the pictures have one size."""

    @property
    def img_size(self) -> int:
        """Return the side that the model sees, in pixels."""
        ...


class Resizing(Protocol):
    """Size of the training pictures."""

    def phase(self, epoch: int) -> Phase:
        """Return the phase that `epoch` belongs to."""
        ...


class Averaging(Protocol):
    """An average of the weights over the steps."""

    needs_batch_norm: bool
    """Whether batch norm's statistics must be measured anew before the average is evaluated."""

    def begin(self, model: nn.Module) -> None:
        """Start from the weights of `model`, once it lies where it will train."""
        ...

    def update(self, model: nn.Module, step: int, steps_per_epoch: int, epochs: int) -> None:
        """Hear that optimizer step number `step`, from 0, was taken."""
        ...

    def model(self) -> nn.Module | None:
        """Return the averaged model, or None while there is none."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        ...

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take it back."""
        ...


class Distillation(Protocol):
    """What a teacher adds to the objective."""

    terms: tuple[str, ...]
    """Names of the terms that it adds."""
    teacher_sha256: str | None
    """SHA-256 of the teacher's weights file in hex; None without a teacher."""

    def __call__(self, losses: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """Map the task's terms, `loss` and `logits` among them, to the objective's."""
        ...


class Finetune(Protocol):
    """Which parameters train, and at which of the optimizer's rates."""

    def apply(self, model: nn.Module, epoch: int) -> bool:
        """Set `requires_grad` for `epoch`; return whether anything changed."""
        ...

    def train(self, model: nn.Module, epoch: int) -> None:
        """Put `model`, or a copy of it, into training mode, but for what is frozen in `epoch`."""
        ...

    def part_of(self, name: str) -> int | None:
        """Return the number of the part of the model that a parameter belongs to; None: it never trains."""
        ...

    def factors(self, epoch: int) -> Sequence[float]:
        """Return what the learning rate of each part is multiplied by in `epoch`."""
        ...

    def cycle(self, epoch: int) -> Cycle | None:
        """Return the phase of `epoch` if it has a learning-rate cycle of its own."""
        ...

    def last(self) -> Finetune:
        """Return what holds at the end of the run, for every epoch."""
        ...


class Tracker(Protocol):
    """Where numbers and pictures go."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log values by name."""
        ...

    def pictures(self, name: str, images: Tensor, step: int) -> None:
        """Log float `(B, C, H, W)` pictures in 0..1."""
        ...

    def figure(self, name: str, png: NDArray[np.uint8], step: int) -> None:
        """Log one `(H, W, 3)` picture."""
        ...

    def hparams(self, config: dict[str, Any], metrics: dict[str, float], step: int = 0) -> None:
        """Log the run's settings beside its results."""
        ...

    def flush(self) -> None:
        """Bring everything to the disk."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class Display(Protocol):
    """What the user watches."""

    def begin(self, run: TrainRun) -> None:
        """Training starts, or goes on."""
        ...

    def step(self, run: TrainRun) -> None:
        """A step was taken."""
        ...

    def end_epoch(self, run: TrainRun, row: dict[str, float], improved: bool) -> None:
        """An epoch was evaluated."""
        ...

    def end(self) -> None:
        """Training is over, for whatever reason."""
        ...


class Silent:
    """A display that shows nothing."""

    def begin(self, run: TrainRun) -> None:
        """Do nothing."""

    def step(self, run: TrainRun) -> None:
        """Do nothing."""

    def end_epoch(self, run: TrainRun, row: dict[str, float], improved: bool) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""


TERMS = ("loss", "acc")
"""What every task measures while it trains."""


@dataclass
class TrainState:
    """Everything that changes while training, besides tensors owned by the model and the optimizer.

    Attributes:
        sums: `(T + 3,)` float64 on the CPU, of the current epoch as of the last `read`: Σ term·n of each of the T
            terms, Σ gradient norm·n, Σ n, and the steps that counted. A step whose loss or gradient is not finite
            does not.
        halt: float32 scalar on the device: 1 after such a step, for the optimizer to stand still.
        terms: Names of the terms.
        epoch: Epochs finished.
        step: Optimizer steps taken.
        batch: Micro-batches taken in the current epoch; a resume starts there.
        history: One row of metrics an epoch, what results.csv shows.
        logged: `sums` at the last log within the epoch.
        logged_at: Seconds and pictures at the last log within the epoch, or at its begin.
        seconds: Time spent training, earlier parts of a resumed run included.
        waited: Seconds of the current epoch in which the loop waited for data.
        images: Pictures trained on, each as often as it was seen.
        parts: In how many parts each micro-batch is computed; more than 1 once memory has run out.
        unread: What `add` was given since the last `read`: whether to halt, terms and norms, on the device; samples.
    """

    sums: Tensor
    halt: Tensor
    terms: tuple[str, ...] = TERMS
    epoch: int = 0
    step: int = 0
    batch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    logged: list[float] = field(default_factory=list)
    logged_at: tuple[float, int] = (0.0, 0)
    seconds: float = 0.0
    waited: float = 0.0
    images: int = 0
    parts: int = 1
    unread: list[tuple[Tensor, int]] = field(default_factory=list)

    @staticmethod
    def new(device: torch.device, terms: tuple[str, ...] = TERMS) -> TrainState:
        """Return the state of a run that has not begun."""
        sums = torch.zeros(len(terms) + 3, dtype=torch.float64)
        return TrainState(sums, torch.zeros((), device=device), terms, logged=[0.0] * len(sums))

    def add(self, terms: list[Tensor], norms: list[Tensor], samples: int, sticky: bool) -> Tensor:
        """Add a step's results, unless they are not finite; nothing is copied to the host.

        Args:
            terms: T scalars float32, means over the step's samples.
            norms: Scalars float32: L2 norms of the gradient's parts.
            samples: How many samples the step had in this process.
            sticky: Whether no later step counts either.

        Returns:
            `halt`, the same in all processes.
        """
        factors, zero = _factors(1 + len(terms) + len(norms), self.halt.device)
        row = torch.stack([self.halt if sticky else zero, *terms, *norms])
        # The factors are 1 for the flag, and 0: 0·x is 0, but 0·inf and 0·nan are nan. A step of a tiny model has no
        # time for a longer test.
        self.halt = row.dot(factors).nan_to_num(1.0)
        if distributed.world_size() > 1:
            self.halt = distributed.largest(self.halt.clone())
            row[0] = self.halt
        self.unread.append((row, samples))
        return self.halt

    def read(self) -> list[float]:
        """Bring `sums` up to date and return them, which waits for the device."""
        if self.unread:
            numbers, sums, count = (
                torch.cat([row for row, _ in self.unread]).tolist(),
                self.sums.tolist(),
                len(self.terms),
            )
            for row, samples in self.unread:
                halted, *values = numbers[: len(row)]
                del numbers[: len(row)]
                if not halted and all(map(math.isfinite, values)):
                    measured = (*values[:count], math.hypot(*values[count:]))
                    step = (*(value * samples for value in measured), samples, 1)
                    sums = [before + now for before, now in zip(sums, step, strict=True)]
            self.sums.copy_(torch.tensor(sums, dtype=self.sums.dtype))
            self.unread.clear()
        return [float(value) for value in self.sums.tolist()]

    def totals(self) -> list[float]:
        """Return `sums` up to date and over all processes; only for a place that all of them come to."""
        if distributed.world_size() == 1:
            return self.read()
        *values, steps = self.rows().unbind(1)
        return [*(float(each.sum()) for each in values), float(steps.max())]

    def rows(self) -> Tensor:
        """Return `sums` up to date as a checkpoint keeps them, `(T + 3,)`, or those of W processes, `(W, T + 3)`."""
        self.read()
        return self.sums if distributed.world_size() == 1 else distributed.gather(self.sums[None])

    def load_sums(self, rows: Tensor) -> None:
        """Take back the `(T + 3,)` sums of a process by itself, or `(W, T + 3)` of W processes.

        With another number of processes than W the first has the total, so that the means stay what they were.
        """
        rows = rows.reshape(-1, len(self.sums))
        rank = distributed.rank()
        if len(rows) == distributed.world_size():
            self.sums.copy_(rows[rank])
        else:
            self.sums.copy_(rows.sum(0) if rank == 0 else torch.zeros_like(self.sums))
            self.sums[-1] = rows[0, -1]

    def means(self, sums: list[float] | None = None) -> dict[str, float]:
        """Return the epoch's running means by name, or those of the part that `sums` stands for."""
        sums = self.read() if sums is None else sums
        count = max(sums[-2], 1.0)
        return {
            f"train/{name}": value / count for name, value in zip((*self.terms, "grad_norm"), sums[:-2], strict=True)
        }

    def end_epoch(self, row: dict[str, float]) -> None:
        """Move on to the next epoch."""
        self.history.append(row)
        self.epoch += 1
        self.batch = 0
        self.logged = [0.0] * len(self.sums)
        self.sums.zero_()
        self.unread.clear()


@functools.cache
def _factors(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return 1 and behind it zeros, and a zero by itself."""
    with torch.inference_mode(False):
        factors = torch.zeros(length, device=device)
        factors[0] = 1.0
        return factors, factors.new_zeros(())


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

    def cycle(self, epoch: int) -> Cycle:
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
