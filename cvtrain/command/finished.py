"""A finished run taken up again, to add artifacts to its folder."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cvtrain import runs
from cvtrain.audit import audit
from cvtrain.build import Builder
from cvtrain.command import deployed
from cvtrain.command.artifacts import INDEX, REFERENCE, Proved, Subject, make_and_prove, reference_of, subject_of
from cvtrain.command.provenance import fingerprint
from cvtrain.command.report import PAGE, refresh
from cvtrain.command.train import build_run
from cvtrain.core import weights
from cvtrain.core.artifact import Artifact
from cvtrain.core.files import sweep, to_json_line, write_json
from cvtrain.core.index import is_older
from cvtrain.engine.signals import StopRequest
from cvtrain.errors import EXIT_OK, ConfigError, CvtrainError, DataError, WeightsError
from cvtrain.evaluation import read_artifacts_csv
from cvtrain.report.console import attach_log, make_console
from cvtrain.schema import validate

log = logging.getLogger("cvtrain")

MODEL = Path("weights") / "model.safetensors"
PLAIN = {
    "precision": {"_target_": "cvtrain.precision.Fp32"},
    "distillation": {"_target_": "cvtrain.distillation.NoDistillation"},
}
"""Parts in place of the run's where nothing is trained: their own may take time, or a teacher's file."""
LIMITS: dict[str, dict[str, float | None]] = {"budget": {"max_drop": 0.01}, "gate": {}}
"""Of runs that were made before there were any, and of files without a run."""


def extend(config: dict[str, Any], trusted: list[str], network: Path | None = None) -> int:
    """Add what `compression` and `export` ask for to the folder of `config["run"]`, and prove all that is there.

    Args:
        config: Of the verb.
        trusted: The user's own packages.
        network: File of the network to export in place of the run's model; None: that.

    Returns:
        The exit code: that of the first artifact that failed, or 10 where the winner misses the gate.

    Raises:
        CvtrainError: Nothing was made.
    """
    console = make_console(bool(config["json"]))
    attach_log(console)
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    folder = Path(str(config["run"])).absolute()
    with opened(folder) as stop:
        builder, subject = taken_up(config, trusted, folder, stop)
        index = indexed(folder) or [reference_of(subject)]
        if network is not None and network.resolve() not in {(folder / MODEL).resolve(), index[0].path.resolve()}:
            label = next((known.name for known in index if known.path.resolve() == network.resolve()), network.stem)
            shipped = deployed.load_file(network, torch.device("cpu"), trusted, channels_last=False)
            subject = dataclasses.replace(subject, network=(label, shipped.model))
        proved = make_and_prove(builder, subject, index)
        proved.show(console, torch.get_num_threads())
        report = runs.read_json(folder / "metrics.json")
        write_json(folder / "metrics.json", {**report, "artifacts": proved.table, "winner": proved.verdict.winner})
        if (folder / PAGE).is_file():
            refresh(folder, trusted)
    return told(proved, builder.config, folder)


def told(proved: Proved, config: dict[str, Any], folder: Path) -> int:
    """Print how it ended, and the last line; return the exit code."""
    error: CvtrainError | None = None
    try:
        proved.settle(config["gate"])
    except CvtrainError as caught:
        error = caught
        sys.stderr.write(f"cvtrain: {error}\n")
    code = EXIT_OK if error is None else error.exit_code
    line = {
        "run": str(folder),
        "status": "failed" if code else "done",
        "exit_code": code,
        "winner": proved.verdict.winner,
        "artifacts": proved.table,
    }
    sys.stdout.write((to_json_line(line) if config["json"] else str(folder)) + "\n")
    return code


@contextmanager
def opened(folder: Path) -> Iterator[StopRequest]:
    """Hold the folder of a finished run, and the signals that ask to stop.

    Raises:
        ConfigError: It is no run folder, or its run is not finished.
        LockedError: Another process is writing to it.
    """
    deployed.run_config(folder)
    with runs.locked(folder), StopRequest() as stop:
        refuse_unfinished(folder)
        sweep(folder)
        yield stop


def refuse_unfinished(folder: Path) -> None:
    """See that a run has come to its end, well or with an artifact or a gate missed.

    Raises:
        ConfigError: It has not.
    """
    state = runs.read_json(folder / runs.STATUS).get("state")
    if state not in ("done", "failed") or not (folder / MODEL).is_file() or not (folder / "metrics.json").is_file():
        raise ConfigError(
            f"run={folder} is not finished ({runs.STATUS}: {state}).\n"
            "Let it finish: the command that started it, with resume=auto."
        )


def indexed(folder: Path) -> list[Artifact]:
    """Return the artifacts of a run, the float model first; none without an artifacts.csv, or with an older cvtrain's.

    Raises:
        WeightsError: A file is missing or damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        return []
    if is_older(path):
        log.warning("%s was written by an older cvtrain; what it names is not proved again", path)
        return []
    found = read_artifacts_csv(path)
    if found[0].name != REFERENCE:
        raise WeightsError(
            f"{path} does not begin with {REFERENCE!r}, which everything is compared with.\n"
            "Delete the table, then make its files again."
        )
    return found


def taken_up(config: dict[str, Any], trusted: list[str], folder: Path, stop: StopRequest) -> tuple[Builder, Subject]:
    """Build a finished run again, with its weights.

    Args:
        config: Of the verb; what it sets stands above the run's own.
        trusted: The user's own packages.
        folder: The run folder.
        stop: Takes requests to stop.

    Raises:
        DataError: The data are gone, or are others than the run was trained on.
        WeightsError: The weights are damaged.
    """
    trains = bool(config.get("compression"))
    given = {**deployed.run_config(folder), "trusted": trusted, "json": config["json"], "threads": config["threads"]}
    given |= {"device": config.get("device", "cpu"), "compile": False, "activation_checkpointing": False}
    given |= {"sync_batchnorm": False, "monitor": "val/acc", "mode": "auto"}
    given |= {"compression": config.get("compression", {}), "export": config["export"]}
    for group in ("budget", "gate"):
        stated = {key: value for key, value in config[group].items() if value is not None}
        given[group] = {**config[group], **given.get(group, LIMITS[group]), **stated}
    given |= {} if trains else PLAIN
    audit(given, trusted)
    validate(given, trusted)
    builder = Builder(given, trusted)
    manifest = runs.read_json(folder / runs.MANIFEST)
    sets, _ = builder.data(manifest.get("pretrained"))
    if manifest.get("data", {}).get("fingerprint") != fingerprint(sets):
        raise DataError(
            f"data {sets.name} is not what {folder} was trained on: other files or labels would move between train, "
            "val and test.\nBring the data back as it was, or train again."
        )
    metadata = weights.read(folder / MODEL)[1]
    # As it was shipped: mean and std may have come from the command line or from pretrained weights.
    sets = dataclasses.replace(sets, preprocess=weights.parse_preprocess(metadata, folder / MODEL))
    device = builder.device()
    try:
        run = build_run(builder, sets, device, folder, stop)
    except WeightsError as error:
        if given["distillation"].get("teacher") is None:
            raise
        log.warning("distillation: %s\nfine-tuning learns from the labels alone", error)
        given |= {"distillation": PLAIN["distillation"]}
        run = build_run(builder, sets, device, folder, stop)
    weights.load_into(run.model, folder / MODEL)
    return builder, subject_of(builder, run, sets, folder, metadata)


def run_of(file: Path) -> Path | None:
    """Return the folder of the run that a file of weights belongs to; None of a file by itself."""
    folder = file.absolute().parent.parent
    return folder if (folder / runs.ARGS).is_file() and (folder / MODEL).is_file() else None
