"""One `cvtrain train`: choose the run folder, hand over to Hydra, print the last line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cvtrain import resume, runs
from cvtrain.command.handover import quoted, to_hydra
from cvtrain.command.job import Outcome, execute
from cvtrain.compose import group_choices
from cvtrain.core import launch
from cvtrain.errors import EXIT_OK, ConfigError, GateError, LockedError


def run(
    composed: DictConfig,
    config: dict[str, Any],
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    trusted: list[str],
) -> int:
    """Train once; return the exit code. Nothing was written before this."""
    choices = group_choices(composed.hydra.runtime.choices)
    if launch.world_size() > 1:
        from cvtrain.command import launched

        return launched.run(config, choices, args, parser, trusted)
    folder = choose_folder(config, choices)
    outcome = settled(folder, config)
    if outcome is not None:
        return tell_finished(outcome, bool(config["json"]))
    outcomes: list[Outcome] = []
    args.overrides += [quoted("hydra.run.dir", folder)]
    to_hydra(args, parser, "train", lambda _: outcomes.append(execute(config, folder, trusted, choices)))
    return report(outcomes[0], bool(config["json"]))


def tell_finished(outcome: Outcome, as_json: bool) -> int:
    """Say that there is nothing to do; return the exit code."""
    sys.stderr.write("cvtrain: this run is already finished; nothing to do (resume=none starts a new one)\n")
    return report(outcome, as_json)


def report(outcome: Outcome, as_json: bool) -> int:
    """Print the error, how to go on, and the last line; return the exit code."""
    if outcome.error is not None:
        sys.stderr.write(f"cvtrain: {outcome.error}\n")
        if (
            outcome.error.retryable
            and not isinstance(outcome.error, LockedError)
            and (Path(outcome.run) / "weights" / "last.safetensors").exists()
        ):
            sys.stderr.write("Go on where it stopped with the same command and resume=auto\n")
    sys.stdout.write((outcome.json_line() if as_json else outcome.run) + "\n")
    return outcome.exit_code


def run_parent(config: dict[str, Any], choices: dict[str, str]) -> Path:
    """Return the folder that holds the runs of this name."""
    return Path(config["output_dir"]) / str(config["name"] or f"{choices['data']}_{choices['model']}")


def choose_folder(config: dict[str, Any], choices: dict[str, str]) -> Path:
    """Return the run folder: a new one, or the one that `resume` means.

    `resume=auto` takes the newest run of this config, then the newest that goes on with it, with more epochs for
    instance, then the newest that does with `resume_allow`. It refuses nothing, since a grid of configs shares a name:
    without such a run it starts a new one, and says what keeps it from the unfinished one.

    Raises:
        ConfigError: `resume` names no run folder, or `resume_allow` no key.
    """
    resume.check_names(config)
    parent, asked = run_parent(config, choices), str(config["resume"])
    if asked == "none":
        return runs.create_folder(parent)
    if asked != "auto":
        folder = Path(asked).absolute()
        if "config" not in runs.read_json(folder / runs.MANIFEST):
            raise ConfigError(
                f"resume={asked} is not a run folder (no manifest.json). Use resume=auto, or the folder that a run "
                "printed."
            )
        return folder
    others = [
        (folder, resume.compare(manifest["config"], config))
        for folder, manifest in runs.newest_first(parent)
        if "config" in manifest
    ]
    same = [folder for folder, changes in others if not resume.asks_for_more(changes)]
    longer = [folder for folder, changes in others if not resume.blocking(changes)]
    allowed = [folder for folder, changes in others if not resume.blocking(changes, config["resume_allow"])]
    for folder in (*same, *longer, *allowed):
        if runs.is_finished(folder) and folder not in same:
            sys.stderr.write(f"cvtrain: going on with {folder}, which was finished: this command asks it for more\n")
        return folder
    _tell_nearest(others)
    return runs.create_folder(parent)


def _tell_nearest(others: list[tuple[Path, list[resume.Change]]]) -> None:
    """Say in a line why the newest unfinished run is not the one, and how it would be."""
    folder, changes = next(((f, c) for f, c in others if not runs.is_finished(f)), (None, []))
    if folder is None:
        return
    blocking = resume.blocking(changes)
    if any(change.effect is resume.Effect.IDENTITY for change in blocking):
        hint = ""
    else:
        hint = f"; to go on there: resume={folder} {resume.allowance(blocking)}"
    sys.stderr.write(
        f"cvtrain: starting a new run; {folder} is unfinished, but of another config: "
        f"{resume.described(blocking)}{hint}\n"
    )


def settled(folder: Path, config: dict[str, Any]) -> Outcome | None:
    """Return what the run in `folder` reported if this config asks for nothing more; None when there is work.

    Raises:
        ConfigError: The run may not go on with this config.
    """
    old = runs.read_json(folder / runs.MANIFEST).get("config")
    if old is None:
        return None
    more = resume.asks_for_more(resume.check(folder, old, config))
    summary = runs.read_json(folder / "metrics.json")
    # Nothing is left to do behind a missed gate either, but to look whether this command's gate is passed.
    missed = runs.read_json(folder / runs.STATUS).get("exit_code") == GateError.exit_code and summary.get("artifacts")
    return finished_outcome(folder, config) if (runs.is_finished(folder) or missed) and not more else None


def finished_outcome(folder: Path, config: dict[str, Any]) -> Outcome:
    """Return what a finished run reported, read back from its folder, and how its artifacts stand to the gate."""
    summary = runs.read_json(folder / "metrics.json")
    outcome = Outcome(
        run=str(folder), status="done", exit_code=EXIT_OK,
        metrics=summary.get("metrics", {}), artifacts=summary.get("artifacts", []), data=summary.get("data", {}),
    )  # fmt: skip
    if outcome.artifacts and any(limit is not None for limit in config["gate"].values()):
        from cvtrain.evaluation.verdict import check_gate, judge

        try:
            check_gate(outcome.artifacts, judge(outcome.artifacts, config["budget"]), config["gate"])
        except GateError as error:
            outcome.status, outcome.exit_code, outcome.error = "failed", error.exit_code, error
    if runs.read_json(folder / runs.STATUS).get("exit_code") != outcome.exit_code:
        runs.write_status(folder, outcome.status, outcome.exit_code, str(outcome.error or ""))
    return outcome
