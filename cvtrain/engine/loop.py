"""The training loop: one page in which every feature appears by name, in the order in which it happens."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from cvtrain.core import distributed
from cvtrain.core.random import seed_torch, step_seed
from cvtrain.core.types import Batch
from cvtrain.engine.batch_norm import remeasure
from cvtrain.engine.divergence import check_finite, keeping_the_batch
from cvtrain.engine.memory import halve_micro_batches
from cvtrain.engine.parts import Metrics
from cvtrain.engine.ranks import average_buffers, in_step
from cvtrain.engine.run import TrainRun
from cvtrain.errors import DivergedError

log = logging.getLogger("cvtrain")

SETTLE_BATCHES = 20
"""Training batches that batch norm's statistics are measured on; Wu & Johnson find a few thousand pictures enough."""


def fit(run: TrainRun) -> None:
    """Train until the last epoch, until patience or time runs out, or until a signal asks to stop.

    Raises:
        DivergedError: The loss or a gradient is not finite; the weights and the last checkpoint are from before.
        Interrupted: SIGINT or SIGTERM; the checkpoint has been written.
    """
    state, options = run.state, run.options
    started = time.monotonic() - state.seconds
    run.display.begin(run)
    with run.stop.deferred(), ending(run), keeping_the_batch(run):
        while state.epoch < options.epochs and not run.monitor.exhausted and not _out_of_time(run):
            if run.finetune.apply(run.model, state.epoch):
                run.share()
            train_epoch(run, started)
            row = {**run_means(run), "lr": _last_lr(run)}
            row |= scores(run)
            is_best = run.monitor.update(row, state.epoch)
            run.schedule.end_epoch(improved=run.monitor.bad_epochs == 0)
            state.seconds = time.monotonic() - started
            state.end_epoch(row)
            if run.cycle(state.epoch).first == state.epoch:
                run.schedule.begin_phase()
            run.tracker.scalars(row, state.step)
            run.display.end_epoch(run, row, is_best)
            run.tracker.flush()
            save(run, best=is_best)


def train_epoch(run: TrainRun, started: float) -> None:
    """Take the rest of the current epoch, one optimizer step for each `grad_accum_steps` micro-batches."""
    state, options = run.state, run.options
    run.finetune.train(run.model, state.epoch)
    state.waited, state.logged_at = 0.0, (time.monotonic() - started, state.images)
    # Closed for certain, so that worker processes end with the epoch, also when an exception leaves it.
    size = run.resizing.phase(state.epoch).img_size
    with closing(run.loader.train_batches(state.epoch, state.batch, size)) as epoch_batches:
        batches = islice(epoch_batches, run.batches_per_epoch - state.batch)
        for micro_batches in grouped(waiting(run, batches), options.grad_accum_steps):
            train_step(run, micro_batches)
            state.batch += len(micro_batches)
            state.seconds = time.monotonic() - started
            run.display.step(run)
            run.stop.exchange()
            if state.step % options.log_every_steps == 0:
                log_step(run)
            if state.batch < run.batches_per_epoch:
                save_if_due(run)


def train_step(run: TrainRun, micro_batches: list[Batch]) -> None:
    """Take one optimizer step; its loss is the mean over all samples, also when the last micro-batch is short.

    Nothing here waits for the device: a loss or gradient that is not finite is kept from the weights there.
    """
    state, options = run.state, run.options
    lr, factors = run.schedule.lr(*run.clock(state.step)), run.finetune.factors(state.epoch)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * factors[group["part"]]
    statistics = saved_buffers(run)
    total = sum(len(batch) for batch in micro_batches)
    everywhere = total if distributed.world_size() == 1 else whole_batches(run, len(micro_batches))
    balance = total * distributed.world_size() / everywhere
    while (terms := accumulate(run, micro_batches, total, balance)) is None:  # memory ran out, and smaller parts help
        for buffer, before in statistics:
            buffer.copy_(before)
    with run.timer.phase("optimizer"):
        norms = run.precision.clip(run.optimizer, options.clip_grad_norm, options.clip_grad_value)
        halt = state.add(terms, norms, total, sticky=options.on_nan == "stop")
        run.precision.step(run.optimizer, halt)
        for group in run.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
    average_buffers(run.model)
    for buffer, before in statistics:
        buffer.copy_(torch.where(halt > 0, before, buffer))
    run.averaging.update(run.model, state.step, run.steps_per_epoch, options.epochs)
    state.step += 1
    state.images += everywhere


def whole_batches(run: TrainRun, count: int) -> int:
    """Return how many samples the next `count` micro-batches have over all processes."""
    return sum(run.loader.batch_total(run.state.batch + i) for i in range(count))


def accumulate(run: TrainRun, micro_batches: list[Batch], total: int, balance: float) -> list[Tensor] | None:
    """Accumulate the gradients of a step.

    Args:
        run: The run.
        micro_batches: The step's.
        total: Their samples.
        balance: `total` over what it would be if all processes had equally many, whose gradients count alike.

    Returns:
        The objective's T terms, scalars on the device, means over the samples; None when memory ran out and the step
        has to be taken again in smaller parts.
    """
    state, options = run.state, run.options
    seed_torch(step_seed(options.seed, state.step, options.rank), run.device)  # dropout and stochastic depth
    terms: list[list[Tensor]] = []
    try:
        for i, batch in enumerate(micro_batches):
            with run.timer.phase("augment"):
                images = run.train_images(batch, state.epoch)
                mix_key = state.step * options.grad_accum_steps + i
                targets = run.task.encode(batch.targets)
                images, targets = run.augmentation.mix(images, targets, options.seed, mix_key, options.rank)
            parts = in_parts(images, targets, state.parts)
            for k, (inputs, wanted) in enumerate(parts):
                share = len(inputs) / total
                with run.gradient_sync(last=i == len(micro_batches) - 1 and k == len(parts) - 1):
                    with run.timer.phase("forward"), run.precision.autocast():
                        losses = run.distillation(run.task.losses(run.train_model, inputs, wanted), inputs)
                    with run.timer.phase("backward"):
                        run.precision.backward(weighted(losses["loss"], share * balance))
                terms.append([weighted(losses[name].detach(), share) for name in state.terms])
    except (RuntimeError, MemoryError) as error:
        # The others would wait for gradients of a step that is taken again.
        if distributed.world_size() > 1 or not halve_micro_batches(
            run, error, largest=max(len(batch) for batch in micro_batches)
        ):
            raise
        return None
    return [functools.reduce(torch.add, parts) for parts in zip(*terms, strict=True)]


def in_parts(images: Tensor, targets: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return a micro-batch in so many parts, as equal as they can be, none of them of one picture."""
    count = min(count, len(images) // 2)
    if count <= 1:
        return [(images, targets)]
    return list(zip(images.tensor_split(count), targets.tensor_split(count), strict=True))


def weighted(value: Tensor, share: float) -> Tensor:
    """Return `value` times its share of the step; most steps have one part, whose share is 1."""
    return value if share == 1.0 else value * share


def log_step(run: TrainRun) -> None:
    """Log the means since the last log; the only place between two epochs that waits for the device."""
    state = run.state
    check_finite(run, state.read())
    sums = state.totals()
    values: dict[str, float] = {}
    if sums[-1] > state.logged[-1]:
        recent = [now - before for now, before in zip(sums, state.logged, strict=True)]
        values = {f"{name}_step": value for name, value in state.means(recent).items()}
    began, images = state.logged_at
    rate = (state.images - images) / max(state.seconds - began, 1e-9)
    run.tracker.scalars({**values, "lr_step": _last_lr(run), "images_per_s_step": rate}, state.step)
    state.logged, state.logged_at = sums, (state.seconds, state.images)


def run_means(run: TrainRun) -> dict[str, float]:
    """Return the means of the epoch that ends.

    Raises:
        DivergedError: A loss or gradient was not finite, or with on_nan=skip none was finite.
    """
    check_finite(run, run.state.read())
    sums = run.state.totals()
    if sums[-1] == 0:
        raise DivergedError(
            f"no step of epoch {run.state.epoch + 1} had a finite loss and gradient; the last checkpoint is from "
            "before.\n"
            "Lower optimizer.lr, set clip_grad_norm=1.0, or use precision=fp32."
        )
    skipped = run.steps_per_epoch - round(sums[-1])
    if skipped:
        log.warning(
            "epoch %d: %d of %d steps had a loss or gradient that was not finite, and were skipped",
            *(run.state.epoch + 1, skipped, run.steps_per_epoch),
        )
    return {**run.state.means(sums), **({"train/skipped": float(skipped)} if skipped else {})}


def scores(run: TrainRun) -> dict[str, float]:
    """Return the validation metrics of the weights to be deployed, and those of the raw ones where they differ."""
    deployed = run.deployed
    settle_batch_norm(run, deployed)
    row = {f"val/{name}": value for name, value in evaluate(run, "val", deployed).compute().items()}
    if deployed is not run.model:
        settle_batch_norm(run, run.model)
        row |= {f"val_raw/{name}": value for name, value in evaluate(run, "val", run.model).compute().items()}
    return row


def settle_batch_norm(run: TrainRun, model: nn.Module) -> None:
    """Measure batch norm's statistics anew on unmixed training pictures, where those of the training do not fit.

    The running averages hold only the last few batches, mixed pictures have other statistics than the ones that are
    evaluated, and averaged weights have never seen a picture. Frozen stages keep theirs. Source: Wu & Johnson,
    "Rethinking 'Batch' in BatchNorm", 2021 (precise batch norm).
    """
    if not run.augmentation.batch and not (run.averaging.needs_batch_norm and model is not run.model):
        return
    was_training = model.training
    run.finetune.train(model, run.state.epoch)
    seed_torch(step_seed(run.options.seed, run.state.step, run.options.rank), run.device)
    with closing(run.loader.train_batches(run.state.epoch)) as batches, run.precision.autocast():
        remeasure(model, (run.eval_images(batch) for batch in islice(batches, SETTLE_BATCHES)))
    average_buffers(model)
    model.train(was_training)


def saved_buffers(run: TrainRun) -> list[tuple[Tensor, Tensor]]:
    """Return the model's buffers with copies, where a step may be left out or taken again, and the run goes on."""
    needed = run.options.on_nan == "skip" or run.options.on_oom == "microbatch"
    return [(b, b.clone()) for b in run.model.buffers()] if needed else []


def save(run: TrainRun, best: bool) -> None:
    """Save, and leave when a signal has asked for it.

    Raises:
        DivergedError: A loss or gradient was not finite; nothing is saved.
        Interrupted: After the save, when a signal has arrived.
    """
    check_finite(run, run.state.read())
    if run.stop.save_now:
        log.info("SIGUSR1: a checkpoint of step %d", run.state.step)
        run.stop.save_now = False
    with run.timer.phase("checkpoint"):
        run.checkpoints.save(run, best=best)
    if run.stop.requested:
        run.checkpoints.wait()
    run.stop.check()


def save_if_due(run: TrainRun) -> None:
    """Save within an epoch when `save_every_steps` says so, or when a signal asks to stop or to save.

    Raises:
        Interrupted: After the save, when a signal has arrived.
    """
    every = run.options.save_every_steps
    if run.stop.requested or run.stop.save_now or (every and run.state.step % every == 0):
        save(run, best=False)


def evaluate(run: TrainRun, split: str, model: nn.Module | None = None) -> Metrics:
    """Measure `model`, or the one to be deployed, on `val` or `test`."""
    with run.timer.phase("evaluate"):
        return evaluate_model(run, model or run.deployed, split, keep=False)[0]


@torch.inference_mode()
def evaluate_model(
    run: TrainRun, model: nn.Module, split: str, full_precision: bool = False, keep: bool = True
) -> tuple[Metrics, Tensor]:
    """Measure `model` on a split.

    Each process looks at its part, and all return the same: the metrics of one process that has these logits.

    Args:
        run: The run.
        model: The network; its mode is left as it was.
        split: `val` or `test`.
        full_precision: Whether to compute in float32, whatever the run's precision.
        keep: Whether the logits are wanted; otherwise a process by itself does not collect them.

    Returns:
        The metrics, and the logits `(N, K)` float32 on the CPU in the split's order, or `(0,)`.
    """
    was_training = model.training
    model.eval()
    metrics = run.task.metrics(run.device)
    logits: list[Tensor] = []
    targets: list[Tensor] = []
    alone = distributed.world_size() == 1
    with closing(run.loader.eval_batches(split, limit=run.options.limit_eval_batches)) as batches:
        for batch in in_step(run.stop, batches):
            if run.stop.requested and run.stop.deferring:  # a resume evaluates again
                save(run, best=False)
            if batch is None:
                continue
            with torch.autocast(run.device.type, enabled=False) if full_precision else run.precision.autocast():
                output = model(run.eval_images(batch))
            if alone:
                metrics.update(output, batch.targets)
            else:
                targets.append(batch.targets)
            if keep or not alone:
                logits.append(output.float())
    model.train(was_training)
    if alone:
        return metrics, torch.cat(logits).cpu() if logits else torch.empty(0)
    gathered = distributed.gather(torch.cat(logits) if logits else None)
    if len(gathered):
        labels, size = distributed.gather(torch.cat(targets) if targets else None), run.loader.batch_total(0)
        for k in range(0, len(labels), size):  # the batches of one process by itself
            metrics.update(gathered[k : k + size].to(run.device), labels[k : k + size].to(run.device))
    return metrics, gathered


@contextmanager
def ending(run: TrainRun) -> Iterator[None]:
    """Wait for the checkpoint that is being written and take the display away, however training ends."""
    try:
        yield
    finally:
        try:
            run.display.end()
        finally:
            run.checkpoints.wait()


def grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Group for accumulation: [a, b, c], 2 -> [a, b], [c]; a short last group is still one optimizer step."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def waiting(run: TrainRun, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield `batches` and add up how long they were waited for."""
    iterator = iter(batches)
    while True:
        began = time.perf_counter()
        with run.timer.phase("data"):
            batch = next(iterator, None)
        run.state.waited += time.perf_counter() - began
        if batch is None:
            return
        yield batch


def _last_lr(run: TrainRun) -> float:
    return run.schedule.lr(*run.clock(max(0, run.state.step - 1)))


def _out_of_time(run: TrainRun) -> bool:
    limit = run.options.max_seconds
    if limit is None:
        return False
    return bool(distributed.largest(torch.tensor(float(run.state.seconds >= limit))))
