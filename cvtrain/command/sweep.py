"""`cvtrain -m …`: every job in a folder named by its overrides; a failure is told at once and stops nobody else."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cvtrain import runs
from cvtrain.audit import audit
from cvtrain.command.handover import quoted, to_hydra
from cvtrain.command.job import Outcome, execute
from cvtrain.command.single import finished_outcome
from cvtrain.compose import Composer, plain
from cvtrain.core.files import to_json_line, write_json
from cvtrain.errors import EXIT_BUG, EXIT_OK, CvtrainError, Interrupted
from cvtrain.schema import validate

LONGEST_NAME = 120
OMITTED = ("json", "resume", "trusted", "output_dir", "hydra.")


def run(composer: Composer, args: argparse.Namespace, parser: argparse.ArgumentParser, trusted: list[str]) -> int:
    """Check every job, run them, print a table; return 0 when all are done, 1 when one failed.

    Raises:
        ConfigError: A job's config is wrong; nothing has run.
    """
    jobs = list(composer.jobs(args.overrides))
    configs = [composer.check(job, trusted)[1] for job in jobs]
    OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
    folder = _sweep_folder(configs[0], args.overrides)
    write_json(folder / "sweep.json", {"overrides": _identity(args.overrides)})
    args.overrides += [quoted("hydra.sweep.dir", folder)]
    outcomes: dict[str, Outcome] = {}

    def task(composed: DictConfig) -> float:
        return _run_job(composed, trusted, outcomes, len(jobs))

    try:
        to_hydra(args, parser, "train", task)
    except CvtrainError as error:
        if isinstance(error, Interrupted):
            sys.stderr.write(f"cvtrain: {error}\nGo on with the same command and resume=auto\n")
            return error.exit_code
    return _report(outcomes, folder, bool(configs[0]["json"]))


def job_folder(overrides: Any) -> str:  # noqa: ANN401 - omegaconf's ListConfig
    """Return a folder name made of a job's overrides: readable, one level, never too long."""
    kept = [str(text) for text in overrides if not str(text).lstrip("+~").startswith(OMITTED)]
    name = re.sub(r"[^\w=.,+~\[\]-]+", "-", ",".join(kept)) or "job"
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def _run_job(composed: DictConfig, trusted: list[str], outcomes: dict[str, Outcome], total: int) -> float:
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    config = plain(composed)
    audit(config, trusted)
    validate(config, trusted)
    if config["resume"] != "none" and runs.is_finished(folder):
        outcome = finished_outcome(folder)
    else:
        sys.stderr.write(f"job {len(outcomes) + 1}/{total}: {folder.name}\n")
        choices = {str(key): str(value) for key, value in hydra.runtime.choices.items() if "hydra" not in str(key)}
        outcome = execute(config, folder, trusted, choices)
    outcomes[folder.name] = outcome
    if outcome.error is not None:  # told now, not after the last job; Hydra must see an exception, never SystemExit
        sys.stderr.write(f"cvtrain: job {folder.name} failed: {outcome.error}\n")
        if isinstance(outcome.error, Interrupted):
            raise KeyboardInterrupt
        raise outcome.error
    return float(outcome.metrics.get(config["monitor"], float("nan")))


def _identity(overrides: list[str]) -> list[str]:
    return sorted(text for text in overrides if not text.startswith(("resume=", "json=")))


def _sweep_folder(config: dict[str, Any], overrides: list[str]) -> Path:
    parent = Path(config["output_dir"]) / str(config["name"] or "multirun")
    if config["resume"] == "auto":
        for folder in sorted(parent.glob("*"), reverse=True):
            if runs.read_json(folder / "sweep.json").get("overrides") == _identity(overrides):
                return folder.absolute()
    return runs.create_folder(parent)


def _report(outcomes: dict[str, Outcome], folder: Path, as_json: bool) -> int:
    from cvtrain.report.console import make_console, sweep_table

    rows = [
        {"name": name, "exit_code": o.exit_code, "metrics": o.metrics, "seconds": o.seconds, "folder": o.run}
        for name, o in outcomes.items()
    ]
    make_console(as_json).print(sweep_table(rows))
    code = EXIT_OK if all(o.exit_code == EXIT_OK for o in outcomes.values()) else EXIT_BUG
    status = "done" if code == EXIT_OK else "failed"
    line = {
        "run": str(folder),
        "status": status,
        "exit_code": code,
        "jobs": [{**row, "run": row.pop("folder")} for row in rows],
    }
    write_json(folder / "sweep.json", {**runs.read_json(folder / "sweep.json"), **line})
    sys.stdout.write((to_json_line(line) if as_json else str(folder)) + "\n")
    return code
