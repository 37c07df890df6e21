"""What is done about a loss or gradient that is not finite: stop before it counts, and keep what it came from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice

import torch
from torch import Tensor

from cvtrain.core import distributed
from cvtrain.engine.run import TrainRun
from cvtrain.errors import DivergedError

log = logging.getLogger("cvtrain")


def check_finite(run: TrainRun, sums: list[float]) -> None:
    """Stop when a loss or gradient of the epoch was not finite; the weights are those from before.

    Args:
        run: The run.
        sums: The state's, copied to the host.

    Raises:
        DivergedError: With the first such step.
    """
    run.precision.check()
    state, options = run.state, run.options
    taken = -(-state.batch // options.grad_accum_steps)
    good = round(sums[-1])
    if options.on_nan == "stop" and good < taken:
        step = state.step - taken + good
        raise DivergedError(
            f"the loss or its gradient was not finite at epoch {state.epoch + 1}, step {step + 1}, lr "
            f"{run.schedule.lr(*run.clock(step)):.3g}; the weights and the last checkpoint are from before.\n"
            "Lower optimizer.lr, set clip_grad_norm=1.0, or use precision=fp32; diverged.json names the pictures.",
            step=step,
            batch=good * options.grad_accum_steps,
        )


@contextmanager
def keeping_the_batch(run: TrainRun) -> Iterator[None]:
    """Write diverged.json and diverged.safetensors when training diverges: the step, its rate and its pictures.

    The batch is a pure function of the epoch and its number, so it is made again here, and never kept while training.
    """
    try:
        yield
    except DivergedError as error:
        if error.step is not None:
            try:
                _keep(run, error.step, error.batch)
            except Exception as cause:
                log.warning("the pictures of the step could not be kept: %s", cause)
        raise


def _keep(run: TrainRun, step: int, first: int) -> None:
    state, options = run.state, run.options
    size = run.resizing.phase(state.epoch).img_size
    tensors: dict[str, Tensor] = {}
    pictures: list[str] = []
    losses: list[str] = []
    with closing(run.loader.train_batches(state.epoch, first, size)) as batches:
        for i, batch in enumerate(islice(batches, options.grad_accum_steps)):
            images, targets = run.train_images(batch, state.epoch), run.task.encode(batch.targets)
            key = step * options.grad_accum_steps + i
            images, targets = run.augmentation.mix(images, targets, options.seed, key, options.rank)
            tensors |= {f"images/{i}": images.contiguous(), f"targets/{i}": targets}
            pictures += run.loader.names(batch.indices)
            with torch.no_grad(), run.precision.autocast():
                losses.append(str(float(run.task.losses(run.model, images, targets)["loss"])))
    document = {
        "step": step + 1,
        "epoch": state.epoch + 1,
        "lr": run.schedule.lr(*run.clock(step)),
        "seed": options.seed,
        "process": f"{distributed.rank() + 1} of {distributed.world_size()}",
        "losses_with_these_weights": losses,
        "pictures": pictures,
    }
    run.checkpoints.keep("diverged", document, tensors)
