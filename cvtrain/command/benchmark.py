"""`cvtrain benchmark run=FOLDER | model=NAME`: how fast artifacts are, and what a model would gain by its artifacts."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig

from cvtrain import runs
from cvtrain.build import Builder, build_model
from cvtrain.command import worker
from cvtrain.command.artifacts import Made, Subject, make, reference_of
from cvtrain.command.finished import MODEL, indexed, opened
from cvtrain.command.provenance import cpu_name, deployment_metadata
from cvtrain.command.results import write_csv
from cvtrain.command.untrained import Untrained
from cvtrain.core import weights
from cvtrain.core.artifact import TORCH, Artifact
from cvtrain.core.files import to_json_line, write_json
from cvtrain.core.types import DataSets, Preprocess
from cvtrain.data import ArraySource
from cvtrain.errors import EXIT_OK, ConfigError, CvtrainError
from cvtrain.evaluation import EvaluationSet, measure, running
from cvtrain.evaluation.table import weigh
from cvtrain.report.console import attach_log, latency_table, make_console
from cvtrain.runtime.base import Start

log = logging.getLogger("cvtrain")

SIDE = 224
"""Side of the pictures of a model that says nothing of its own."""


def run(config: dict[str, Any], trusted: list[str]) -> int:
    """Measure, write benchmark.csv and benchmark.json, and print table and folder.

    Returns:
        The exit code: that of the first artifact that could not be made or measured.

    Raises:
        ConfigError: Neither or both of `run=` and `model=` are given.
        WeightsError: An artifact of the run is missing or has changed.
    """
    if (config["run"] is None) == ("model" not in config):
        raise ConfigError(
            "give one of run=FOLDER (the folder that a run printed) and model=NAME (an option of the model group)."
        )
    console = make_console(bool(config["json"]))
    attach_log(console)
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    threads, failures = torch.get_num_threads(), []
    with ExitStack() as stack:
        if config["run"] is not None:
            folder = Path(str(config["run"])).absolute()
            stack.enter_context(opened(folder))
            artifacts = indexed(folder) or [Artifact("fp32", folder / MODEL, TORCH, 0, 0)]
        else:
            folder, made = _made(config, trusted)
            artifacts, failures = [made.reference, *made.artifacts], made.failures
        rows = measured(artifacts, config, worker.isolated(threads, trusted), failures)
        code = failures[0].exit_code if failures else EXIT_OK
        told = {
            "run": str(folder),
            "exit_code": code,
            "cpu": cpu_name(),
            "threads": threads,
            "rows": rows,
        }
        write_csv(folder / "benchmark.csv", rows)
        packages = ("cvtrain", "torch", "onnxruntime")
        versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
        write_json(folder / "benchmark.json", {**told, "versions": versions})
    console.print(latency_table(rows, f"Latency of the model call on {threads} CPU thread{'s' * (threads > 1)}"))
    console.print(
        f"{told['cpu']}, {threads} thread{'s' * (threads > 1)}; measured in turns, each in a process of its own; "
        f"speed: median to that of {rows[0]['artifact']}; memory: peak above the libraries, so far",
        markup=False,
    )
    for failure in failures:
        sys.stderr.write(f"cvtrain: {failure}\n")
    sys.stdout.write((to_json_line(told) if config["json"] else str(folder)) + "\n")
    return code


def measured(
    artifacts: Sequence[Artifact], config: dict[str, Any], start: Start, failures: list[CvtrainError]
) -> list[dict[str, Any]]:
    """Return a row for each batch size and artifact, the artifacts measured in turns.

    Args:
        artifacts: The first is what the others are compared with.
        config: Has `batches` and `runs`.
        start: Starts an artifact.
        failures: Takes what keeps an artifact from being loaded.

    Raises:
        CvtrainError: The first cannot be loaded, or one has died.
    """
    rows = []
    with running(artifacts, start) as workers:
        alive = []
        for artifact, one in zip(artifacts, workers, strict=True):
            try:
                one.metadata  # noqa: B018 - waits until it is loaded
                alive.append((artifact, one, weigh(artifact.path).size))
            except CvtrainError as error:
                if artifact is artifacts[0]:
                    raise
                failures.append(error)
        for batch in sorted(set(config["batches"])):  # ascending, since memory is a peak
            log.info("benchmark: %d artifact%s, batch %d", len(alive), "s" * (len(alive) > 1), batch)
            latencies = measure([one for _, one, _ in alive], batch, config["runs"])
            for (artifact, one, size), latency in zip(alive, latencies, strict=True):
                rows.append(
                    {
                        "artifact": artifact.name,
                        "runtime": artifact.runtime,
                        "batch": batch,
                        "latency_ms_p50": latency.p50,
                        "latency_ms_p95": latency.p95,
                        "latency_ms_iqr": latency.iqr,
                        "images_per_s": latency.throughput,
                        "memory_mb": one.memory(),
                        "bytes": size,
                        "speed": latencies[0].p50 / latency.p50,
                    }
                )
    return rows


def _made(config: dict[str, Any], trusted: list[str]) -> tuple[Path, Made]:
    """Build the model with random weights, and its artifacts in a folder of their own."""
    builder, node = Builder(config, trusted), config["model"]
    size = config["img_size"] or node.get("img_size") or node.get("native_size") or SIDE
    channels, classes = config["in_channels"], config["num_classes"]
    torch.manual_seed(config["seed"])  # what networks draw their weights from
    model = build_model(builder, node, classes, channels, size).eval()
    half = (0.5,) * channels
    nothing = ArraySource(torch.zeros(0, channels, 1, 1, dtype=torch.uint8), np.zeros(0, dtype=np.int64), [])
    prepared = Preprocess(size, size, channels, half, half)
    names = [str(i) for i in range(classes)]
    sets = DataSets("nothing", names, prepared, nothing, nothing, nothing)
    metadata = {**deployment_metadata({"model": node, "head": "linear"}, sets), "temperature": "1"}
    choice = HydraConfig.get().runtime.choices["model"]
    folder = runs.create_folder(Path(str(config["output_dir"])) / f"benchmark_{choice}")
    (folder / "weights").mkdir()
    weights.save_weights(model, folder / MODEL, metadata)
    subject = Subject(
        model=model,
        example=torch.zeros(1, *prepared.shape),
        folder=folder,
        metadata=metadata,
        training=Untrained(prepared.shape, classes, config["seed"]),
        evaluation=EvaluationSet(lambda: iter(()), names, lambda logits: logits.argmax(1)),
        pictures="no pictures",
    )
    made = Made(folder / "artifacts.csv", reference_of(subject))
    make(builder, subject, made)
    return folder, made
