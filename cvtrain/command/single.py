"""One `cvtrain train`: choose the run folder, hand over to Hydra, print the last line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cvtrain import runs
from cvtrain.command.handover import quoted, to_hydra
from cvtrain.command.job import Outcome, execute
from cvtrain.compose import group_choices
from cvtrain.errors import EXIT_OK, ConfigError


def run(
    composed: DictConfig,
    config: dict[str, Any],
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    trusted: list[str],
) -> int:
    """Train once; return the exit code. Nothing was written before this."""
    choices = group_choices(composed.hydra.runtime.choices)
    folder = choose_folder(config, choices)
    outcome = finished_outcome(folder) if config["resume"] != "none" and runs.is_finished(folder) else None
    if outcome is None:
        outcomes: list[Outcome] = []
        args.overrides += [quoted("hydra.run.dir", folder)]
        to_hydra(args, parser, "train", lambda _: outcomes.append(execute(config, folder, trusted, choices)))
        outcome = outcomes[0]
    else:
        sys.stderr.write("cvtrain: this run is already finished; nothing to do (resume=none starts a new one)\n")
    return report(outcome, bool(config["json"]))


def report(outcome: Outcome, as_json: bool) -> int:
    """Print the error, how to go on, and the last line; return the exit code."""
    if outcome.error is not None:
        sys.stderr.write(f"cvtrain: {outcome.error}\n")
        if outcome.error.retryable and (Path(outcome.run) / "weights" / "last.safetensors").exists():
            sys.stderr.write("Go on where it stopped with the same command and resume=auto\n")
    sys.stdout.write((outcome.json_line() if as_json else outcome.run) + "\n")
    return outcome.exit_code


def run_parent(config: dict[str, Any], choices: dict[str, str]) -> Path:
    """Return the folder that holds the runs of this name."""
    return Path(config["output_dir"]) / str(config["name"] or f"{choices['data']}_{choices['model']}")


def choose_folder(config: dict[str, Any], choices: dict[str, str]) -> Path:
    """Return the run folder: a new one, or the one that `resume` means.

    Raises:
        ConfigError: `resume` names no run folder, or one of another config.
    """
    parent = run_parent(config, choices)
    resume, digest = str(config["resume"]), runs.config_hash(config)
    if resume == "auto":
        return runs.find_run(parent, digest) or runs.create_folder(parent)
    if resume != "none":
        folder = Path(resume).absolute()
        manifest = runs.read_json(folder / "manifest.json")
        if not manifest:
            raise ConfigError(
                f"resume={resume} is not a run folder (no manifest.json). Use resume=auto, or the folder "
                f"that a run printed."
            )
        if manifest.get("config_hash") != digest:
            raise ConfigError(
                f"resume={resume} was started with another config; see {folder / 'args.yaml'}. Give the "
                f"same overrides, or start a new run."
            )
        return folder
    return runs.create_folder(parent)


def finished_outcome(folder: Path) -> Outcome:
    """Return what a finished run reported, read back from its folder."""
    summary = runs.read_json(folder / "metrics.json")
    return Outcome(
        run=str(folder), status="done", exit_code=EXIT_OK,
        metrics=summary.get("metrics", {}), artifacts=summary.get("artifacts", []), data=summary.get("data", {}),
    )  # fmt: skip
