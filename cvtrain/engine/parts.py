"""What the parts of a run must be able to do; each is built from one config group."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cvtrain.core.phases import Phase
from cvtrain.core.types import Batch
from cvtrain.resizing import SizePhase

if TYPE_CHECKING:
    from cvtrain.engine.run import TrainRun


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


class Resizing(Protocol):
    """Size of the training pictures."""

    def phase(self, epoch: int) -> SizePhase:
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

    def cycle(self, epoch: int) -> Phase | None:
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
