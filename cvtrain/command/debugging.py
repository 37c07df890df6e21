"""What the `debug` options do to a run: their parts are put in before it begins, and speak when it is over."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rich.console import Console

from cvtrain.command.results import write_csv
from cvtrain.core import distributed
from cvtrain.engine import overfit
from cvtrain.engine.gradients import GradientTable
from cvtrain.engine.run import TrainRun
from cvtrain.engine.timing import PhaseTimer, Profiler
from cvtrain.report.diagnosis import bottleneck, gradient_table, time_table

log = logging.getLogger("cvtrain")


def attach(run: TrainRun, config: dict[str, Any], folder: Path, console: Console) -> None:
    """Put the measuring parts into a run that is about to begin or go on; of several processes into the first."""
    if distributed.rank():
        return
    if config["log_gradients"]:
        GradientTable(run, folder, lambda epoch, rows: console.print(gradient_table(epoch, rows)))
    if config["profile"]:
        left = run.options.epochs * run.steps_per_epoch - run.state.step
        run.timer = Profiler(run.device, folder, left)


def tell_times(run: TrainRun, config: dict[str, Any], choices: dict[str, str], console: Console) -> None:
    """Show where the time went, when `profile` asks for it."""
    timer = run.timer
    timer.close()
    if not isinstance(timer, PhaseTimer):
        return
    times = timer.table()
    steps = -(-run.loader.steps_per_epoch // run.options.grad_accum_steps)
    console.print(time_table(times, steps))
    chosen = {
        "device": run.device.type,
        "precision": run.precision.state()["format"],
        "compile": config["compile"],
        "channels_last": config["channels_last"],
        "aug": choices.get("aug", ""),
    }
    log.info("%s", bottleneck(times.shares(steps), run.loader, chosen))
    if isinstance(timer, Profiler):
        log.info("profiler: %s opens in ui.perfetto.dev or chrome://tracing", timer.path)


def end_overfit(run: TrainRun, folder: Path) -> dict[str, float]:
    """Write the curves of `debug=overfit`, say whether it passed, and return the last epoch's row.

    Raises:
        GateError: The batch was not learnt by heart.
    """
    history = run.state.history
    if distributed.main():
        write_csv(folder / "results.csv", [{"epoch": i + 1, **row} for i, row in enumerate(history)])
        from cvtrain.report import plots  # matplotlib: a run without pictures need not wait for it

        plots.curves(history, folder / "results.png")
    log.info("%s", overfit.verdict(run))
    return history[-1]
