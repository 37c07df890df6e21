"""Train: the steps of a run, in order."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from cvtrain import __version__, runs
from cvtrain.build import Builder
from cvtrain.command.results import Evaluation, write_results
from cvtrain.core import distributed, weights
from cvtrain.core.artifact import TORCH, Artifact, CompressionContext
from cvtrain.core.complexity import count_macs, count_params
from cvtrain.core.files import write_atomic, write_json
from cvtrain.core.metrics import ClassificationMetrics
from cvtrain.core.types import Batch, DataSets
from cvtrain.engine.checkpoint import BEST, CheckpointStore
from cvtrain.engine.loop import evaluate_model, fit
from cvtrain.engine.monitor import Monitor
from cvtrain.engine.run import TrainRun, TrainState
from cvtrain.engine.silent import NoCheckpoints, Silent
from cvtrain.engine.signals import StopRequest
from cvtrain.errors import ConfigError
from cvtrain.logger import NoLogger
from cvtrain.report import plots
from cvtrain.report.console import Progressing, artifacts_table, attach_log, make_console
from cvtrain.scheduler import Cosine

log = logging.getLogger("cvtrain")


@dataclass(frozen=True)
class TrainResult:
    """What a finished run reports."""

    metrics: dict[str, float]
    artifacts: list[dict[str, Any]]
    data: dict[str, int]


def train(config: dict[str, Any], folder: Path, trusted: list[str], choices: dict[str, str]) -> TrainResult:
    """Train, evaluate, compress, export and prove; every file goes to `folder`.

    Args:
        config: Resolved, audited and validated.
        folder: The run folder; exists and is locked by the caller.
        trusted: The user's own packages.
        choices: Which option each group has.

    Raises:
        CvtrainError: Any failure with a known cause.
    """
    console = make_console(bool(config["json"]))
    attach_log(console)
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    builder = Builder(config, trusted)
    device = builder.device()
    (folder / "weights").mkdir(exist_ok=True)
    write_atomic(folder / "args.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
    with StopRequest() as stop:
        sets, source = builder.data()
        _describe(folder, config, choices, sets, device)
        for note in sets.notes:
            log.info("data: %s", note)
        run = build_run(builder, sets, device, folder, stop, console)
        resumed = run.checkpoints.restore(run)
        if resumed:
            log.info("resume: goes on after epoch %d, step %d, from %s", run.state.epoch, run.state.step, resumed)
        elif getattr(source, "splits", None):
            write_json(folder / "splits.json", source.splits)
        run.tracker = builder.build("logger", folder=folder, purge_step=run.state.step + 1 if resumed else None)
        try:
            show_batches(run, folder, sets.class_names)
            fit(run)
            return conclude(builder, run, sets, folder, console)
        finally:
            run.tracker.close()


def build_run(builder: Builder, sets: DataSets, device: torch.device, folder: Path, stop: StopRequest, console: Any) -> TrainRun:  # noqa: ANN401 - rich.Console
    """Build every part of the run; nothing has trained yet."""
    config = builder.config
    rank, world_size = distributed.rank(), distributed.world_size()
    if config["monitor"] == "val/top5" and sets.num_classes <= 5:
        raise ConfigError(f"monitor=val/top5 needs more than 5 classes, this data has {sets.num_classes}; use monitor=val/acc.")
    loader = builder.loader(sets, device, rank, world_size)
    augmentation = builder.augmentation()
    regularizers = builder.build_each("regularizer")
    model = builder.model(sets)
    for regularizer in regularizers.values():
        regularizer.attach(model)
    model = model.to(device, memory_format=torch.channels_last if config["channels_last"] else torch.contiguous_format)  # type: ignore[call-overload]
    task = builder.build("task", loss=builder.build("loss"), regularizers=list(regularizers.values()), num_classes=sets.num_classes)
    builder.build_each("compression"), builder.build_each("export")  # wrong settings are told before epoch 1
    fixed = {"config_hash": runs.config_hash(config), "version": __version__, "class_names": sets.class_names, "preprocess": sets.preprocess.to_dict()}
    run = TrainRun(
        options=builder.options(rank), device=device, model=model, preprocess=sets.preprocess, loader=loader, augmentation=augmentation,
        task=task, optimizer=builder.optimizer(model), schedule=builder.build("scheduler"), precision=builder.build("precision"),
        finetune=builder.build("finetune"), checkpoints=CheckpointStore(folder / "weights", fixed),
        monitor=Monitor(config["monitor"], builder.monitor_mode(), config["patience"], config["min_delta"]),
        tracker=NoLogger(), display=Progressing(console), stop=stop,
        state=TrainState(sums=torch.zeros(3, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)),
    )  # fmt: skip
    log.info(
        "data %s: %d train, %d val (chooses the checkpoint), %d test (reported once); %d classes, %d×%d×%d",
        sets.name, len(sets.train), len(sets.val), len(sets.test), sets.num_classes, sets.preprocess.channels, *(sets.preprocess.img_size,) * 2,
    )  # fmt: skip
    log.info("loader: %s, %s; device %s, %d threads; %s parameters", loader.mode, loader.reason, device, torch.get_num_threads(), f"{count_params(model):,}")
    run.precision.setup(device, model, lambda trial: _one_loss(run, trial))  # type: ignore[attr-defined]
    return run


def _one_loss(run: TrainRun, model: nn.Module) -> Tensor:
    batch = next(iter(run.loader.train_batches(0)))
    images = run.train_images(batch, 0)
    return run.task.losses(model, images, run.task.encode(batch.targets))["loss"]


def show_batches(run: TrainRun, folder: Path, class_names: list[str]) -> None:
    """Write what the model is about to see: an augmented training batch with its labels, and log it."""
    batch = next(iter(run.loader.train_batches(run.state.epoch)))
    images = run.augmentation.samples(batch.images, batch.indices, run.options.seed, run.state.epoch, run.preprocess.img_size)
    targets = run.task.encode(batch.targets)
    images, targets = run.augmentation.mix(images, targets, run.options.seed, run.state.step, run.options.rank)
    plots.batch(images, [_caption(row, class_names) for row in targets.cpu()], folder / "train_batch0.jpg")
    run.tracker.pictures("train/batch", images, run.state.step)


def _caption(target: Tensor, names: list[str]) -> str:
    top = target.topk(min(2, len(target)))
    parts = [f"{names[int(k)]}" + (f" {p:.2f}" if p < 0.995 else "") for p, k in zip(top.values, top.indices, strict=True) if p > 0.005]
    return " + ".join(parts)


def conclude(builder: Builder, run: TrainRun, sets: DataSets, folder: Path, console: Any) -> TrainResult:  # noqa: ANN401 - rich.Console
    """Evaluate the best checkpoint once on the test set, then compress, export, prove and report."""
    metadata = deployment_metadata(builder.config, sets)
    if (folder / "weights" / BEST).exists():
        tensors, _ = run.checkpoints.read(BEST)
        run.model.load_state_dict({name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")})
    model = run.model.eval()
    weights.save_weights(model, folder / "weights" / "model.safetensors", metadata)
    run.checkpoints.record("model.safetensors")
    metrics, logits = evaluate_model(run, model, "test", full_precision=True)
    if not isinstance(metrics, ClassificationMetrics):
        raise TypeError(type(metrics).__name__)
    results = {**run.monitor.best_row, **{f"test/{name}": value for name, value in metrics.compute().items()}}
    evaluation = Evaluation(metrics.matrix(), logits, sets.test.labels[: len(logits)], sets.test.names[: len(logits)], sets.class_names)
    intervals, figures = write_results(folder, run.state.history, results, evaluation)
    for name, figure in figures.items():
        run.tracker.figure(name, figure, run.state.step)
    console.print(
        f"best epoch {run.monitor.best_epoch + 1} of {run.state.epoch} by {run.monitor.name}; trained {run.state.seconds:.1f} s; test accuracy "
        f"{100 * results['test/acc']:.2f} % [{100 * intervals['test/acc'][0]:.2f}, {100 * intervals['test/acc'][1]:.2f}] on {len(logits)} pictures"
    )
    rows = prove_artifacts(builder, run, sets, folder, metadata)
    console.print(artifacts_table(rows, sets.num_classes, len(logits), torch.get_num_threads()))
    artifacts = [{k: v for k, v in dataclasses.asdict(row).items() if k != "note"} for row in rows]
    counts = sets.counts()
    write_json(folder / "metrics.json", {"metrics": results, "intervals_95": intervals, "artifacts": artifacts, "data": counts})
    run.tracker.hparams(_flat(builder.config), {f"hparam/{run.monitor.name}": results.get(run.monitor.name, float("nan")), "hparam/test/acc": results["test/acc"]})
    return TrainResult(results, artifacts, counts)


def prove_artifacts(builder: Builder, run: TrainRun, sets: DataSets, folder: Path, metadata: dict[str, str]) -> list[Any]:
    """Compress and export the trained model, then run every file in its own runtime on the test set."""
    from cvtrain.compression import run_steps
    from cvtrain.evaluation.proof import prove, write_artifacts_csv
    from cvtrain.export import export_onnx, write_preprocess

    model = run.model.cpu().to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    example = torch.zeros(1, sets.preprocess.channels, sets.preprocess.img_size, sets.preprocess.img_size)
    deployed = folder / "weights" / "model.safetensors"
    reference = Artifact("fp32", deployed, TORCH, count_params(model), count_macs(model, example), model=model)
    artifacts: list[Artifact] = []
    exporters, steps = builder.build_each("export"), builder.build_each("compression")
    if exporters:
        (folder / "export").mkdir(exist_ok=True)
        for name, exporter in exporters.items():
            log.info("export: %s", name)
            artifact = exporter.export(model, example, folder / "export", metadata)
            if artifact.runtime == TORCH:  # the same weights again: one row, of the file that is meant to be given away
                reference = dataclasses.replace(reference, path=artifact.path)
            else:
                artifacts.append(artifact)
        write_preprocess(folder / "export", metadata)
    if steps:
        (folder / "compressed").mkdir(exist_ok=True)
        log.info("compression: %s", ", then ".join(steps))
        context = CompressionContext(
            folder=folder / "compressed",
            example=example,
            calibration=lambda: _calibration(run),
            finetune=lambda candidate, epochs: finetune(builder, run, candidate, epochs),
            save_weights=lambda candidate, path: weights.save_weights(candidate, path, metadata),
            export_onnx=lambda candidate, path: export_onnx(candidate, example, path, metadata),
        )
        artifacts += run_steps(steps, model, context)
    limit = run.options.limit_eval_batches
    rows = prove(
        reference, artifacts, lambda: _labelled(run, limit), example,
        threads=torch.get_num_threads(), run_folder=folder,
    )  # fmt: skip
    write_artifacts_csv(rows, folder / "artifacts.csv")
    plots.artifacts(rows, folder / "artifacts.png")
    return rows


def _calibration(run: TrainRun) -> Iterator[Tensor]:
    for batch in run.loader.train_batches(0):  # in the seeded order: a folder's own order is class by class
        yield run.preprocess(batch.images).cpu()


def _labelled(run: TrainRun, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    batch: Batch
    for i, batch in enumerate(run.loader.eval_batches("test")):
        if i == limit:
            return
        yield run.preprocess(batch.images).cpu(), batch.targets.cpu()


def finetune(builder: Builder, run: TrainRun, model: nn.Module, epochs: int) -> None:
    """Train `model` in place for `epochs` by the run's own recipe, from a tenth of its learning rate down to zero."""
    model.to(run.device, memory_format=torch.channels_last if run.options.channels_last else torch.contiguous_format)  # type: ignore[call-overload]
    options = dataclasses.replace(
        run.options, epochs=epochs, seed=run.options.seed + 1, base_lr=run.options.base_lr / 10, save_every_steps=None, max_seconds=None
    )
    fit(
        dataclasses.replace(
            run, options=options, model=model, optimizer=builder.optimizer(model), schedule=Cosine(),
            monitor=Monitor(run.monitor.name, run.monitor.mode), checkpoints=NoCheckpoints(), tracker=NoLogger(), display=Silent(),
            state=TrainState(sums=torch.zeros_like(run.state.sums)),
        )  # fmt: skip
    )
    model.cpu().to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def deployment_metadata(config: dict[str, Any], sets: DataSets) -> dict[str, str]:
    """Return what a deployed file carries: how to rebuild the model and how to feed it."""
    return {
        "cvtrain_version": __version__,
        "class_names": json.dumps(sets.class_names),
        "preprocess": json.dumps(sets.preprocess.to_dict()),
        "model": json.dumps(config["model"]),
        "git": _git_sha() or "",
    }


def _describe(folder: Path, config: dict[str, Any], choices: dict[str, str], sets: DataSets, device: torch.device) -> None:
    write_json(
        folder / "manifest.json",
        {
            "config_hash": runs.config_hash(config),
            "command": sys.argv,
            "choices": choices,
            "versions": {"cvtrain": __version__, "python": platform.python_version(), "torch": torch.__version__, "torchvision": importlib.metadata.version("torchvision")},
            "hardware": {
                "machine": platform.machine(),
                "cpu": platform.processor(),
                "threads": torch.get_num_threads(),
                "device": str(device),
                "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            },
            "data": {"name": sets.name, "classes": sets.class_names, **sets.counts(), "labels_sha256": _labels_hash(sets)},
            "git": _git_sha(),
        },
    )


def _labels_hash(sets: DataSets) -> str:
    import hashlib

    digest = hashlib.sha256()
    for source in (sets.train, sets.val, sets.test):
        digest.update(np.ascontiguousarray(source.labels).tobytes())
        digest.update("\n".join(source.names).encode())
    return digest.hexdigest()


def _git_sha() -> str | None:
    """Return the commit of the user's working folder, if it is under git."""
    if shutil.which("git") is None:
        return None
    answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
