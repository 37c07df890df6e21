"""One `cvtrain train` in several processes: the first one has the folder and the word, the others only compute."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from cvtrain import runs
from cvtrain.command.handover import quoted, to_hydra
from cvtrain.command.job import Outcome, execute, held_signals
from cvtrain.command.single import choose_folder, report, run_parent, settled, tell_finished
from cvtrain.core import distributed, launch
from cvtrain.core.files import write_json
from cvtrain.errors import CvtrainError, DivergedError, Interrupted

LAUNCH = "launch.json"


def run(
    config: dict[str, Any],
    choices: dict[str, str],
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    trusted: list[str],
) -> int:
    """Train together with the other processes of the launch; return this process's exit code.

    Raises:
        CvtrainError: In the first process, before the run has a folder.
    """
    with held_signals() as signals:
        try:
            distributed.init(config["device"], config["dist_timeout_s"])
            folder, done = distributed.shared(lambda: _begin(config, choices))
        except CvtrainError as error:
            signals.over = True
            distributed.tell(error)
            return _refused(error)
        if done is not None:
            distributed.leave()
            return tell_finished(done, bool(config["json"])) if launch.rank() == 0 else done.exit_code
        distributed.last_words(lambda error: _report(_failed(folder, error), folder, config))
        with contextlib.ExitStack() as stack:
            # The others write what a run writes too: into a folder that goes with them.
            own = folder if distributed.main() else Path(stack.enter_context(tempfile.TemporaryDirectory()))
            args.overrides += [quoted("hydra.run.dir", own)]
            outcomes: list[Outcome] = []
            to_hydra(
                args,
                parser,
                "train",
                lambda _: outcomes.append(execute(config, own, trusted, choices, distributed.explained)),
            )
            signals.over = True
            return _end(outcomes[0], own, folder, config)


def _begin(config: dict[str, Any], choices: dict[str, str]) -> tuple[Path, Outcome | None]:
    """Choose the folder; after a restart by torchrun that of this launch, whatever `resume` says."""
    mine = {"launch": launch.identity()}
    folder = None
    if launch.restarts():
        found = runs.newest_first(run_parent(config, choices), LAUNCH)
        folder = next((path for path, content in found if content == mine), None)
    folder = folder or choose_folder(config, choices)
    write_json(folder / LAUNCH, mine)
    return folder, settled(folder, config)


def _refused(error: CvtrainError) -> int:
    """Say why nothing was started, once for all processes."""
    if launch.rank() == 0:
        sys.stderr.write(f"cvtrain: {error}\n")
    distributed.finish()
    distributed.abandon()
    return error.exit_code


def _end(outcome: Outcome, own: Path, folder: Path, config: dict[str, Any]) -> int:
    error = outcome.error
    if error is not None and not (isinstance(error, DivergedError) and own != folder):  # all diverge alike
        distributed.tell(error)
    if distributed.speaker():
        _report(outcome if own == folder else _failed(folder, error), folder, config)
    elif outcome.exit_code == 1 and (own / "crash.txt").exists():
        sys.stderr.write((own / "crash.txt").read_text())
    # Torchrun stops all as soon as one leaves; with an error of its own a process must leave, to be noticed.
    if error is None or isinstance(error, Interrupted | DivergedError):
        distributed.finish()
    distributed.abandon()
    return outcome.exit_code


def _failed(folder: Path, error: CvtrainError | None) -> Outcome:
    """Write into status.json what another process, or this one's watch, has found; return it."""
    error = error or CvtrainError("the first process has died.")
    state, retryable = runs.ending(error)
    runs.write_status(folder, state, error.exit_code, str(error), retryable)
    return Outcome(run=str(folder), status=state, exit_code=error.exit_code, error=error)


def _report(outcome: Outcome, folder: Path, config: dict[str, Any]) -> None:
    report(outcome, bool(config["json"]))
    sys.stdout.flush()
