"""A run is one dataclass of small parts, each built from one config group; parts get values, never the config."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cvtrain.core.types import Batch, Preprocess
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

    def eval_batches(self, split: str) -> Generator[Batch, None, None]:
        """Yield `val` or `test` once, in order."""
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

    def step(self, optimizer: torch.optim.Optimizer, clip_grad_norm: float | None) -> Tensor | None:
        """Take the optimizer's step."""
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
        """Hear that another size of pictures begins."""
        ...

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        ...

    def load_state(self, state: dict[str, float]) -> None:
        """Take it back."""
        ...


class Phase(Protocol):
    """Epochs in which the pictures have one size."""

    @property
    def first(self) -> int:
        """Return its first epoch."""
        ...

    @property
    def epochs(self) -> int:
        """Return how many epochs it has."""
        ...

    @property
    def img_size(self) -> int:
        """Return the side that the model sees, in pixels."""
        ...

    @property
    def lr(self) -> float | None:
        """Return the base learning rate; None means the run's."""
        ...


class Resizing(Protocol):
    """Size of the training pictures."""

    def phase(self, epoch: int) -> Phase:
        """Return the phase that `epoch` belongs to."""
        ...


class Finetune(Protocol):
    """Which parameters train."""

    def apply(self, model: nn.Module, epoch: int) -> bool:
        """Set `requires_grad` for `epoch`; return whether anything changed."""
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

    def hparams(self, config: dict[str, Any], metrics: dict[str, float]) -> None:
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


@dataclass
class TrainState:
    """Everything that changes while training, besides tensors owned by the model and the optimizer.

    Attributes:
        epoch: Epochs finished.
        step: Optimizer steps taken.
        batch: Micro-batches taken in the current epoch; a resume starts there.
        sums: `(3,)` float64 on the device: Σ loss·n, Σ acc·n and Σ n of the current epoch.
        history: One row of metrics an epoch, what results.csv shows.
        seconds: Time spent training, earlier parts of a resumed run included.
        images: Pictures trained on, each as often as it was seen.
    """

    sums: Tensor
    epoch: int = 0
    step: int = 0
    batch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    images: int = 0

    @staticmethod
    def new(device: torch.device) -> TrainState:
        """Return the state of a run that has not begun."""
        return TrainState(torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device))

    def end_epoch(self, row: dict[str, float]) -> None:
        """Move on to the next epoch."""
        self.history.append(row)
        self.epoch += 1
        self.batch = 0
        self.sums.zero_()

    def means(self) -> dict[str, float]:
        """Return the running means of the epoch; copies to the host."""
        loss, acc, count = self.sums.tolist()
        return {"train/loss": loss / max(count, 1.0), "train/acc": acc / max(count, 1.0)}


@dataclass(frozen=True)
class TrainOptions:
    """Plain settings of the loop; names and units as in configs/train.yaml."""

    epochs: int
    seed: int
    base_lr: float
    grad_accum_steps: int = 1
    clip_grad_norm: float | None = None
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
    monitor: Monitor
    checkpoints: CheckpointStore
    tracker: Tracker
    stop: StopRequest
    state: TrainState
    display: Display = field(default_factory=Silent)

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

    def clock(self, step: int) -> tuple[float, Clock]:
        """Return the base learning rate and the schedule's time of an optimizer step: both are the phase's own."""
        phase = self.resizing.phase(step // self.steps_per_epoch)
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
