"""What is done when memory runs out in the middle of a step."""

from __future__ import annotations

import logging

import torch
from torch import nn

from cvtrain.engine.run import TrainRun

log = logging.getLogger("cvtrain")


def out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that the device, or the machine for a CPU, has no memory left."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def halve_micro_batches(run: TrainRun, error: BaseException, largest: int) -> bool:
    """Cut the micro-batches of this step and all later ones into twice as many parts, where that is allowed and helps.

    The samples of a step and the step itself stay the same but for rounding, and for what batch norm sees.

    Args:
        run: Its gradients are thrown away; the step has to be taken again.
        error: What the step raised.
        largest: Samples in the largest micro-batch.

    Returns:
        Whether to try again.
    """
    state = run.state
    if run.options.on_oom != "microbatch" or not out_of_memory(error) or 4 * state.parts > largest:
        return False
    state.parts *= 2
    run.optimizer.zero_grad(set_to_none=True)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in run.model.modules())
    log.warning(
        "out of memory at step %d: each micro-batch is computed in %d parts of %d pictures from now on; the batch of "
        "a step stays as it is%s",
        *(state.step, state.parts, -(-largest // state.parts)),
        ", but batch norm sees smaller ones" if norms else "",
    )
    return True
