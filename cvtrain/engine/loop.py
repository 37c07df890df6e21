"""The training loop: one page in which every feature appears by name, in the order in which it happens."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import islice

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from cvtrain.core.random import step_seed
from cvtrain.core.types import Batch
from cvtrain.engine.run import Display, Metrics, TrainRun
from cvtrain.errors import DivergedError

SETTLE_BATCHES = 20
"""Training batches that batch norm's statistics are measured on; Wu & Johnson find a few thousand pictures enough."""


def fit(run: TrainRun) -> None:
    """Train until the last epoch, until patience or time runs out, or until a signal asks to stop.

    Raises:
        DivergedError: The loss is not finite; the last checkpoint is from before.
        Interrupted: SIGINT or SIGTERM; the checkpoint has been written.
    """
    state, options = run.state, run.options
    started = time.monotonic() - state.seconds
    run.display.begin(run)
    with run.stop.deferred(), ending(run.display):
        while state.epoch < options.epochs and not run.monitor.exhausted and not _out_of_time(run):
            run.finetune.apply(run.model, state.epoch)
            train_epoch(run, started)
            row = {**state.means(), "lr": _last_lr(run)}
            check_finite(run, row["train/loss"])
            settle_batch_norm(run)
            row |= {f"val/{name}": value for name, value in evaluate(run, "val").compute().items()}
            is_best = run.monitor.update(row, state.epoch)
            run.schedule.end_epoch(improved=run.monitor.bad_epochs == 0)
            state.seconds = time.monotonic() - started
            state.end_epoch(row)
            if run.resizing.phase(state.epoch).first == state.epoch:
                run.schedule.begin_phase()
            run.tracker.scalars(row, state.step)
            run.display.end_epoch(run, row, is_best)
            run.tracker.flush()
            run.checkpoints.save(run, best=is_best)
            run.stop.check()


def train_epoch(run: TrainRun, started: float) -> None:
    """Take the rest of the current epoch, one optimizer step for each `grad_accum_steps` micro-batches."""
    state, options = run.state, run.options
    run.model.train()
    # Closed for certain, so that worker processes end with the epoch, also when an exception leaves it.
    size = run.resizing.phase(state.epoch).img_size
    with closing(run.loader.train_batches(state.epoch, state.batch, size)) as epoch_batches:
        batches = islice(epoch_batches, run.batches_per_epoch - state.batch)
        for micro_batches in grouped(batches, options.grad_accum_steps):
            train_step(run, micro_batches)
            state.batch += len(micro_batches)
            state.seconds = time.monotonic() - started
            run.display.step(run)
            if state.batch < run.batches_per_epoch:
                save_if_due(run)


def settle_batch_norm(run: TrainRun) -> None:
    """Measure batch norm's statistics anew on unmixed training pictures, where the augmentation mixes batches.

    The running averages hold only the last few batches, and mixed pictures have other statistics than the ones that
    are evaluated. Source: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021 (precise batch norm).
    """
    if not run.augmentation.batch:
        return
    torch.manual_seed(step_seed(run.options.seed, run.state.step, run.options.rank))
    with closing(run.loader.train_batches(run.state.epoch)) as batches, run.precision.autocast():
        update_bn((run.eval_images(batch) for batch in islice(batches, SETTLE_BATCHES)), run.model)


def save_if_due(run: TrainRun) -> None:
    """Save within an epoch when `save_every_steps` says so, or when a signal asks to stop.

    Raises:
        Interrupted: After the save, when a signal has arrived.
    """
    every = run.options.save_every_steps
    if run.stop.requested or (every and run.state.step % every == 0):
        run.checkpoints.save(run, best=False)
        run.stop.check()


def train_step(run: TrainRun, micro_batches: list[Batch]) -> None:
    """Take one optimizer step; its loss is the mean over all samples, also when the last micro-batch is short."""
    state, options = run.state, run.options
    torch.manual_seed(step_seed(options.seed, state.step, options.rank))  # dropout and stochastic depth
    for group in run.optimizer.param_groups:
        group["lr"] = run.schedule.lr(*run.clock(state.step))
    total = sum(len(batch) for batch in micro_batches)
    for i, batch in enumerate(micro_batches):
        images = run.train_images(batch, state.epoch)
        mix_key = state.step * options.grad_accum_steps + i
        images, targets = run.augmentation.mix(
            images, run.task.encode(batch.targets), options.seed, mix_key, options.rank
        )
        with run.precision.autocast():
            losses = run.task.losses(run.model, images, targets)
        if run.device.type == "cpu":  # on a GPU this would wait for the device; there the epoch's sum tells
            check_finite(run, float(losses["loss"].detach()))
        run.precision.backward(losses["loss"] * (len(batch) / total))
        state.sums += torch.stack([losses["loss"].detach(), losses["acc"], torch.ones_like(losses["acc"])]).to(
            state.sums
        ) * len(batch)
    run.precision.step(run.optimizer, options.clip_grad_norm)
    run.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.images += total


def evaluate(run: TrainRun, split: str, model: nn.Module | None = None) -> Metrics:
    """Measure `model`, or the run's own, on `val` or `test`."""
    return evaluate_model(run, model or run.model, split)[0]


@torch.inference_mode()
def evaluate_model(run: TrainRun, model: nn.Module, split: str, full_precision: bool = False) -> tuple[Metrics, Tensor]:
    """Return the metrics and the logits `(N, K)` float32 on the CPU, N in the split's order."""
    was_training = model.training
    model.eval()
    metrics = run.task.metrics(run.device)
    logits: list[Tensor] = []
    with closing(run.loader.eval_batches(split)) as batches:
        for batch in islice(batches, run.options.limit_eval_batches):
            with torch.autocast(run.device.type, enabled=False) if full_precision else run.precision.autocast():
                output = model(run.eval_images(batch))
            metrics.update(output, batch.targets)
            logits.append(output.float())
            if run.stop.requested:  # only while training: a resume evaluates again
                run.checkpoints.save(run, best=False)
                run.stop.check()
    model.train(was_training)
    return metrics, torch.cat(logits).cpu()


@contextmanager
def ending(display: Display) -> Iterator[None]:
    """Take the display away, however training ends."""
    try:
        yield
    finally:
        display.end()


def grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Group for accumulation: [a, b, c], 2 -> [a, b], [c]; a short last group is still one optimizer step."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def check_finite(run: TrainRun, loss: float) -> None:
    """Stop before a loss that is not finite reaches the weights or a checkpoint.

    Raises:
        DivergedError: `loss` is NaN or infinite.
    """
    if not math.isfinite(loss):
        state = run.state
        raise DivergedError(
            f"the loss became {loss} at epoch {state.epoch + 1}, step {state.step}, lr "
            f"{_last_lr(run):.3g}; the last checkpoint is from before.\n"
            "Lower optimizer.lr, set clip_grad_norm=1.0, or use precision=fp32."
        )


def _last_lr(run: TrainRun) -> float:
    return run.schedule.lr(*run.clock(max(0, run.state.step - 1)))


def _out_of_time(run: TrainRun) -> bool:
    limit = run.options.max_seconds
    return limit is not None and run.state.seconds >= limit
