"""`cvtrain inspect what=lr`: which learning rate the run of the same command should take."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from cvtrain import runs
from cvtrain.build import Builder
from cvtrain.command.results import write_csv
from cvtrain.command.train import build_run
from cvtrain.core.files import to_json_line
from cvtrain.core.types import Batch
from cvtrain.engine.loop import grouped, train_step
from cvtrain.engine.run import TrainRun
from cvtrain.engine.signals import StopRequest
from cvtrain.errors import EXIT_OK, DivergedError
from cvtrain.inspection.lr_finder import HIGHEST, LOWEST, RangeTest, range_test
from cvtrain.report import plots
from cvtrain.report.console import attach_log, make_console

log = logging.getLogger("cvtrain")

FILES = ["lr_finder.csv", "lr_finder.png"]


class _FixedRate:
    """A schedule that gives the rate of the test's present step."""

    def __init__(self) -> None:
        self.now = LOWEST

    def lr(self, base_lr: float, clock: object) -> float:
        """Return the rate, whatever the time."""
        return self.now

    def end_epoch(self, improved: bool) -> None:
        """Do nothing."""

    def begin_phase(self) -> None:
        """Do nothing."""

    def state(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        """Do nothing."""


def run(config: dict[str, Any], trusted: list[str]) -> int:
    """Write curve and picture, print the override to train with and the folder; return 0.

    The steps are those of the run itself, on weights of its own that are thrown away.

    Raises:
        CvtrainError: What would also stop the run.
    """
    attach_log(make_console(bool(config["json"])))
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    builder = Builder(config, trusted)
    device = builder.device()
    sets, _ = builder.data()
    folder = runs.create_folder(Path(str(config["output_dir"])) / f"inspect_{sets.name}")
    trial = build_run(builder, sets, device, folder, StopRequest())
    log.info("inspect: %d steps at learning rates from %g to %g", config["steps"], LOWEST, HIGHEST)
    found = measure(trial, config["steps"])
    rows = zip(found.lrs.tolist(), found.losses.tolist(), found.smoothed.tolist(), strict=True)
    write_csv(folder / FILES[0], [{"lr": lr, "loss": loss, "smoothed": mean} for lr, loss, mean in rows])
    plots.lr_range(found.lrs, found.losses, found.smoothed, found.suggestion, folder / FILES[1])
    _tell(found, config, folder)
    return EXIT_OK


def measure(run: TrainRun, steps: int) -> RangeTest:
    """Take up to `steps` steps of a run that has not begun, at growing rates."""
    schedule = _FixedRate()
    run.schedule = schedule
    run.finetune.apply(run.model, 0)
    run.finetune.train(run.model, 0)
    batches = _endless(run)

    def step(lr: float) -> float:
        schedule.now = lr
        run.state.sums.zero_()
        try:
            train_step(run, next(batches))
        except DivergedError:
            return math.inf
        loss = run.state.means()["train/loss"]
        return loss if run.state.halt.item() == 0 else math.inf

    with closing(batches):
        return range_test(step, steps)


def _endless(run: TrainRun) -> Generator[list[Batch], None, None]:
    """Yield the batches of each step, epoch after epoch."""
    size = run.resizing.phase(0).img_size
    epoch = 0
    while True:
        with closing(run.loader.train_batches(epoch, 0, size)) as batches:
            yield from grouped(islice(batches, run.batches_per_epoch), run.options.grad_accum_steps)
        epoch += 1


def _tell(found: RangeTest, config: dict[str, Any], folder: Path) -> None:
    unfreezing = [name for name, phase in (config["finetune"].get("phases") or {}).items() if phase]
    key = f"finetune.phases.{unfreezing[0]}.head_lr" if unfreezing else "optimizer.lr"
    override = f"{key}={found.suggestion:g}"
    end = "did not diverge" if found.diverged is None else f"diverged at {found.diverged:.2g}"
    log.info(
        "learning rate: the loss falls fastest at %.2g, is smallest at %.2g, %s; suggested is half of the rate of the "
        "smallest loss",
        *(found.steepest, found.lowest, end),
    )
    if not found.falls:
        log.warning(
            "the loss hardly fell at any rate, so the suggestion means little: raise steps=%d, or see with "
            "debug=overfit whether the model learns at all",
            config["steps"],
        )
    told = {
        "run": str(folder),
        "exit_code": EXIT_OK,
        "files": FILES,
        "override": override,
        "lr": {"suggested": found.suggestion, "steepest": found.steepest, "lowest": found.lowest}
        | {"diverged": found.diverged},
    }
    sys.stdout.write((to_json_line(told) if config["json"] else f"{override}\n{folder}") + "\n")
