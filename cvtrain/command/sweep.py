"""`cvtrain -m …`: every job in a folder named by its overrides; a failure is told at once and stops nobody else."""

from __future__ import annotations

import argparse
import contextlib
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
from cvtrain.command.single import settled
from cvtrain.compose import Composer, group_choices, plain
from cvtrain.core.files import to_json_line, write_json
from cvtrain.errors import EXIT_BUG, EXIT_OK, ConfigError, CvtrainError, Interrupted
from cvtrain.schema import validate

SWEEP = "sweep.json"
LONGEST_NAME = 120
OMITTED = ("json", "resume", "trusted", "output_dir", "hydra.")


def run(composer: Composer, args: argparse.Namespace, parser: argparse.ArgumentParser, trusted: list[str]) -> int:
    """Check every job, run them, print a table; return 0 when all are done, 1 when one failed.

    Raises:
        ConfigError: A job's config is wrong; nothing has run.
    """
    configs = [composer.check(job, trusted)[1] for job in composer.jobs(args.overrides)]
    folds = _folds(configs)
    if folds is not None:
        args.overrides.append(f"data.fold={','.join(str(fold) for fold in range(folds))}")
    jobs = list(composer.jobs(args.overrides))
    OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
    folder = _sweep_folder(configs[0], args.overrides)
    number = runs.read_json(folder / SWEEP).get("number") or runs.next_number(folder.parent, SWEEP)
    write_json(folder / SWEEP, {"number": number, "overrides": _identity(args.overrides)})
    args.overrides += [quoted("hydra.sweep.dir", folder)]
    outcomes: dict[str, Outcome] = {}
    with contextlib.suppress(CvtrainError):  # told when it happened; the table and the exit code say it again
        to_hydra(args, parser, "train", lambda composed: _run_job(composed, trusted, outcomes, len(jobs)))
    code = _report(outcomes, folder, bool(configs[0]["json"]), len(jobs))
    stopped = [o for o in outcomes.values() if isinstance(o.error, Interrupted)]
    if stopped:
        sys.stderr.write("cvtrain: the sweep was stopped; go on with the same command and resume=auto\n")
        return stopped[0].exit_code
    return code


def _folds(configs: list[dict[str, Any]]) -> int | None:
    """Return the number of folds when `data.folds` asks for all of them."""
    asked = {config["data"].get("folds") for config in configs if config["data"].get("fold") is None}
    if len(asked) > 1:
        raise ConfigError(
            f"data.folds={','.join(str(folds) for folds in sorted(asked, key=str))}: a sweep takes one number of "
            "folds; start one for each."
        )
    return next(iter(asked), None)


def job_folder(overrides: Any) -> str:  # noqa: ANN401 - omegaconf's ListConfig
    """Return a folder name made of a job's overrides: readable, one level, never too long, no two alike."""
    kept = [str(text) for text in overrides if not str(text).lstrip("+~").startswith(OMITTED)]
    whole = ",".join(kept)
    name = re.sub(r"[^\w=.,+~\[\]-]+", "-", whole)[:LONGEST_NAME] or "job"
    return name if name == whole or not whole else f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _run_job(composed: DictConfig, trusted: list[str], outcomes: dict[str, Outcome], total: int) -> float:
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    if any(isinstance(outcome.error, Interrupted) for outcome in outcomes.values()):
        raise Interrupted("not started: the sweep was stopped.")
    outcome = _outcome(composed, folder, trusted, f"job {len(outcomes) + 1}/{total}: {folder.name}")
    outcome.overrides = [str(text) for text in hydra.overrides.task]
    outcomes[folder.name] = outcome
    if outcome.error is not None:  # told now, not after the last job; Hydra must see an exception, never SystemExit
        sys.stderr.write(f"cvtrain: job {folder.name} failed: {outcome.error}\n")
        raise outcome.error
    return float(outcome.metrics.get(composed.monitor, float("nan")))


def _outcome(composed: DictConfig, folder: Path, trusted: list[str], announcement: str) -> Outcome:
    try:
        config = plain(composed)
        audit(config, trusted)
        validate(config, trusted)
        done = settled(folder, config)
    except CvtrainError as error:  # a combination that was not among the ones checked before the start
        return Outcome(run=str(folder), status="failed", exit_code=error.exit_code, error=error)
    if done is not None:
        return done
    sys.stderr.write(f"{announcement}\n")
    return execute(config, folder, trusted, group_choices(HydraConfig.get().runtime.choices))


def _identity(overrides: list[str]) -> list[str]:
    return sorted(text for text in overrides if not text.startswith(("resume=", "resume_allow=", "json=")))


def _sweep_folder(config: dict[str, Any], overrides: list[str]) -> Path:
    parent = Path(config["output_dir"]) / str(config["name"] or "multirun")
    if config["resume"] not in ("none", "auto"):
        folder = Path(config["resume"]).absolute()
        if runs.read_json(folder / SWEEP).get("overrides") != _identity(overrides):
            raise ConfigError(f"resume={config['resume']} is no sweep of this command; use resume=auto.")
        return folder
    if config["resume"] == "auto":
        for folder, sweep in runs.newest_first(parent, SWEEP):
            if sweep.get("overrides") == _identity(overrides):
                return folder
    return runs.create_folder(parent)


def _report(outcomes: dict[str, Outcome], folder: Path, as_json: bool, total: int) -> int:
    from cvtrain.report.console import make_console, sweep_table

    rows = [
        {
            **{"name": name, "overrides": o.overrides, "run": o.run, "exit_code": o.exit_code},
            **{"metrics": o.metrics, "seconds": o.seconds},
        }
        for name, o in outcomes.items()
    ]
    make_console(as_json).print(sweep_table(rows))
    good = len(outcomes) == total and all(outcome.exit_code == EXIT_OK for outcome in outcomes.values())
    code = EXIT_OK if good else EXIT_BUG
    line = {"run": str(folder), "status": "done" if good else "failed", "exit_code": code, "jobs": rows}
    write_json(folder / SWEEP, {**runs.read_json(folder / SWEEP), **line})
    sys.stdout.write((to_json_line(line) if as_json else str(folder)) + "\n")
    return code
