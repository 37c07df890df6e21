"""What a resume goes on with: said in the log, and kept in manifest.json."""

from __future__ import annotations

import dataclasses
import logging
from datetime import datetime
from typing import Any

import torch

from cvtrain import resume
from cvtrain.averaging import Swa
from cvtrain.command.provenance import environment
from cvtrain.engine.run import TrainRun
from cvtrain.resume import Effect

log = logging.getLogger("cvtrain")

COMPARED_STEPS = 1000
"""Steps at which the rates of two lengths of a run are compared."""


def record(run: TrainRun, config: dict[str, Any], name: str) -> dict[str, Any]:
    """Log where a restored run stands, what has changed since its checkpoint, and how exact the rest will be.

    Args:
        run: Restored.
        config: Resolved, of this command.
        name: File name of the checkpoint.

    Returns:
        Time, checkpoint, epoch, step, level, its reasons and the changed values, for manifest.json.
    """
    document, state = run.checkpoints.origin, run.state
    log.info("resume: goes on after epoch %d, step %d, from %s", state.epoch, state.step, name)
    changes = resume.compare(document["config"], config)
    others = [change for change in changes if change.key != "epochs"]
    if others:
        log.info("resume: %s", resume.described(others))
    changes = [_with_schedule(run, change) if change.key == "epochs" else change for change in changes]
    exact = run.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    level, reasons = resume.exactness(changes, document["environment"], environment(run.device), exact)
    name_of_level = "sample-exact, not bit-exact" if level == "sample-exact" else level
    log.log(
        logging.INFO if level == "bit-exact" else logging.WARNING,
        "resume: %s%s",
        *(name_of_level, f": {'; '.join(reasons)}" if reasons else ""),
    )
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "checkpoint": name,
        "epoch": state.epoch,
        "step": state.step,
        "level": level,
        "reasons": reasons,
        "changes": [str(change) for change in changes],
    }


def _with_schedule(run: TrainRun, change: resume.Change) -> resume.Change:
    """Log what another number of epochs does to the schedule; return the change with the effect that it has here."""
    step = run.state.step
    steps = {*range(0, step, max(1, step // COMPARED_STEPS)), max(0, step - 1)} if step else set()
    kept = all(_rate(run, past, change.old) == _rate(run, past, change.new) for past in steps)
    # The average of the last epochs has begun where a longer run does not begin it yet.
    kept = kept and not (isinstance(run.averaging, Swa) and run.averaging.count > 0)
    schedule = type(run.schedule).__name__
    next_rate = _rate(run, step, change.new)
    if kept:
        log.info("resume: %s: no rate of %s so far changes; the next step has lr %.3g", change, schedule, next_rate)
    else:
        log.warning(
            "resume: %s: %s now ends at epoch %d; the last step had lr %.3g, the next has %.3g",
            *(change, schedule, change.new, _rate(run, max(0, step - 1), change.old), next_rate),
        )
    return dataclasses.replace(change, effect=Effect.ENDING if kept else Effect.TRAINING)


def _rate(run: TrainRun, step: int, epochs: int) -> float:
    base_lr, clock = run.clock(step)
    first = (step - clock.step) // clock.steps_per_epoch
    if first + clock.epochs == run.options.epochs:  # else a phase before the last, which keeps its length
        clock = dataclasses.replace(clock, epochs=epochs - first)
    return run.schedule.lr(base_lr, clock)
