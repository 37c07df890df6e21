"""After training: compress, export, and prove every file in its own runtime."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from cvtrain.averaging import NoAveraging
from cvtrain.build import Builder, lay_out
from cvtrain.compression import run_steps
from cvtrain.core import weights
from cvtrain.core.artifact import TORCH, Artifact, CompressionContext
from cvtrain.core.complexity import count_macs, count_params
from cvtrain.engine.checkpoint import NoCheckpoints
from cvtrain.engine.loop import fit
from cvtrain.engine.monitor import Monitor
from cvtrain.engine.parts import Silent
from cvtrain.engine.run import TrainRun
from cvtrain.engine.state import TrainState
from cvtrain.errors import CvtrainError, Interrupted, StorageError
from cvtrain.evaluation.proof import ProofRow, prove, write_artifacts_csv
from cvtrain.export import export_onnx, write_preprocess
from cvtrain.logger import NoLogger
from cvtrain.report import plots
from cvtrain.resizing import Constant
from cvtrain.scheduler import Cosine

log = logging.getLogger("cvtrain")

FINETUNE_LR = 0.1
"""Share of the run's learning rate that fine-tuning after a compression step starts from."""


def make_artifacts(
    builder: Builder, run: TrainRun, folder: Path, metadata: dict[str, str]
) -> tuple[list[ProofRow], list[CvtrainError]]:
    """Compress and export the trained model; write artifacts.csv and artifacts.png.

    Args:
        builder: Of the run's config.
        run: Trained, with the weights to deploy.
        folder: The run folder, which has `weights/model.safetensors`.
        metadata: What every file carries.

    Returns:
        One row an artifact, the float model first; and what went wrong with the artifacts that are missing.
    """
    model = lay_out(run.model, torch.device("cpu"), channels_last=False).eval()
    size = run.preprocess.img_size
    example = torch.zeros(1, run.preprocess.channels, size, size)
    deployed = folder / "weights" / "model.safetensors"
    reference = Artifact("fp32", deployed, TORCH, count_params(model), count_macs(model, example), model=model)
    artifacts: list[Artifact] = []
    failures: list[CvtrainError] = []
    for name, exporter in builder.build_each("export").items():
        log.info("export: %s", name)
        (folder / "export").mkdir(exist_ok=True)
        write_preprocess(folder / "export", metadata)
        with _noted(failures, f"export={name}"):
            artifact = exporter.export(model, example, folder / "export", metadata)
            if artifact.runtime == TORCH:  # the same weights again: one row, of the file that is meant to be given away
                reference = dataclasses.replace(reference, path=artifact.path)
            else:
                artifacts.append(artifact)
    with _noted(failures, "compression"):
        artifacts += _compressed(builder, run, model, example, folder / "compressed", metadata)
    threads = torch.get_num_threads()
    rows = prove(
        reference,
        artifacts,
        lambda: _labelled(run),
        example,
        threads=threads,
        run_folder=folder,
        decide=run.task.decide,
    )
    write_artifacts_csv(rows, folder / "artifacts.csv")
    plots.artifacts(rows, folder / "artifacts.png")
    return rows, failures


@contextmanager
def _noted(failures: list[CvtrainError], what: str) -> Iterator[None]:
    """Let the other artifacts be made when one fails; a request to stop and a full disk end the run at once."""
    try:
        yield
    except (Interrupted, StorageError):
        raise
    except CvtrainError as error:
        log.warning("%s failed: %s", what, error)
        failures.append(error)


def _compressed(
    builder: Builder, run: TrainRun, model: nn.Module, example: Tensor, folder: Path, metadata: dict[str, str]
) -> list[Artifact]:
    steps = builder.build_each("compression")
    if not steps:
        return []
    folder.mkdir(exist_ok=True)
    log.info("compression: %s", ", then ".join(steps))
    context = CompressionContext(
        folder=folder,
        example=example,
        calibration=lambda: _calibration(run),
        finetune=lambda candidate, epochs: _finetune(builder, run, candidate, epochs),
        save_weights=lambda candidate, path: weights.save_weights(candidate, path, metadata),
        export_onnx=lambda candidate, path: export_onnx(candidate, example, path, metadata),
    )
    return run_steps(steps, model, context)


def _calibration(run: TrainRun) -> Iterator[Tensor]:
    with closing(run.loader.train_batches(0)) as batches:  # in the seeded order: a folder's own is class by class
        for batch in batches:
            yield run.preprocess(batch.images).cpu()


def _labelled(run: TrainRun) -> Iterator[tuple[Tensor, Tensor]]:
    with closing(run.loader.eval_batches("test")) as batches:
        for batch in islice(batches, run.options.limit_eval_batches):
            yield run.preprocess(batch.images).cpu(), batch.targets.cpu()


def _finetune(builder: Builder, run: TrainRun, model: nn.Module, epochs: int) -> None:
    lay_out(model, run.device, run.options.channels_last)
    options = dataclasses.replace(
        run.options,
        epochs=epochs,
        seed=run.options.seed + 1,  # other augmentations than in the epochs before
        base_lr=run.clock(run.options.epochs * run.steps_per_epoch - 1)[0] * FINETUNE_LR,
        save_every_steps=None,
        max_seconds=None,
    )
    finetune = run.finetune.last()
    inner = dataclasses.replace(
        run,
        options=options,
        model=model,
        finetune=finetune,
        optimizer=builder.optimizer(model, finetune),
        schedule=Cosine(),
        monitor=Monitor(run.monitor.name, run.monitor.mode),
        checkpoints=NoCheckpoints(),
        tracker=NoLogger(),
        display=Silent(),
        state=TrainState.new(run.device, run.state.terms),
        resizing=Constant(epochs, run.preprocess.img_size),
        averaging=NoAveraging(),
        wrapped=None,
    )
    fit(inner)
    lay_out(model, torch.device("cpu"), channels_last=False).eval()
