"""What an artifact of a finished run answers on a split of the run's data."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.audit import audit
from cvtrain.aug.views import View
from cvtrain.build import Builder
from cvtrain.command import deployed, worker
from cvtrain.command.finished import MODEL, indexed
from cvtrain.command.results import Evaluation
from cvtrain.core import weights
from cvtrain.core.artifact import TORCH, Artifact
from cvtrain.core.metrics import measured
from cvtrain.core.types import DataSets, Source
from cvtrain.engine.checkpoint import BEST, LAST, CheckpointStore
from cvtrain.errors import ConfigError, DataError, WeightsError, did_you_mean
from cvtrain.evaluation.calibration import fit_temperature, to_logits, to_probabilities
from cvtrain.runtime.prepare import class_names, temperature
from cvtrain.schema import validate


@dataclass(frozen=True)
class FinishedRun:
    """A finished run taken up to be measured or looked at; nothing in its folder is changed.

    Attributes:
        folder: The run folder.
        builder: Of the run's own config, on the device that the verb asks for.
        sets: Its data, prepared as the shipped model wants them.
        artifacts: Rows of artifacts.csv, the float model first.
        checkpoints: Weights of the training: `best`, `last`, and their averages.
        trusted: The user's own packages.
    """

    folder: Path
    builder: Builder
    sets: DataSets
    artifacts: Sequence[Artifact]
    checkpoints: Sequence[Artifact]
    trusted: Sequence[str]

    def artifact(self, name: str) -> Artifact:
        """Return the artifact or checkpoint called `name`.

        Raises:
            ConfigError: There is none.
        """
        known = {artifact.name: artifact for artifact in (*self.checkpoints, *self.artifacts)}
        if name in known:
            return known[name]
        names = [artifact.name for artifact in (*self.artifacts, *self.checkpoints)]
        raise ConfigError(f"artifact={name}: {did_you_mean(name, names, 'artifacts')} in {self.folder}")

    def source(self, split: str) -> Source:
        """Return the pictures of `train`, `val` or `test`."""
        found: Source = getattr(self.sets, split)
        return found


@dataclass(frozen=True)
class Answers:
    """What one artifact says of every picture of a split.

    Attributes:
        artifact: Which one.
        split: `train`, `val` or `test`.
        class_names: K names, the run's.
        names: N names of the pictures.
        labels: `(N,)` int64 class numbers, or `(N, K)` of 0 and 1.
        logits: `(N, K)` float32 on the CPU, columns in the order of `class_names`.
        temperature: What the artifact's file says logits are divided by before they become probabilities.
        seconds: What reading and answering took.
    """

    artifact: Artifact
    split: str
    class_names: Sequence[str]
    names: Sequence[str]
    labels: NDArray[np.int64]
    logits: Tensor
    temperature: float
    seconds: float

    @property
    def multilabel(self) -> bool:
        """Return whether a picture may have several labels."""
        return self.labels.ndim == 2

    @property
    def probabilities(self) -> Tensor:
        """Return calibrated probabilities `(N, K)` float32: softmax, or of several labels sigmoid, at `temperature`."""
        return to_probabilities(self.logits, self.temperature, self.multilabel)

    @property
    def decided(self) -> NDArray[np.int64]:
        """Return the answers in the shape of `labels`."""
        answers = (self.logits >= 0).long() if self.multilabel else self.logits.argmax(1)
        found: NDArray[np.int64] = answers.numpy()
        return found

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Return `(N,)`: whether all of an answer is right."""
        right: NDArray[np.bool_] = (self.decided == self.labels).reshape(len(self.labels), -1).all(1)
        return right

    def calibrated(self) -> Answers:
        """Return the same probabilities with a temperature of 1: then `loss` is theirs too."""
        return dataclasses.replace(self, logits=self.logits / self.temperature, temperature=1.0)

    def evaluation(self, run: FinishedRun) -> Evaluation:
        """Return what `results.write_evaluation` writes."""
        metrics = measured(self.logits, torch.from_numpy(self.labels))
        given = metrics, self.logits, self.labels, self.names, self.class_names, self.temperature
        return Evaluation(*given, run.source(self.split).read, self.split)


def open_run(folder: Path, config: dict[str, Any], trusted: list[str]) -> FinishedRun:
    """Take up a finished run.

    Args:
        folder: The run folder.
        config: Of the verb: `device`.
        trusted: The user's own packages.

    Raises:
        ConfigError: It is no run folder.
        DataError: The data are gone, or have other classes than the model.
        WeightsError: The weights are missing or damaged.
    """
    given = {**deployed.run_config(folder), "trusted": trusted, "device": config["device"], "class_weights": "none"}
    path = folder / MODEL
    if not path.is_file():
        raise WeightsError(f"run={folder} has no {MODEL}. Let it finish: the same command with resume=auto.")
    metadata = weights.read(path)[1]
    prepared = weights.parse_preprocess(metadata, path)
    # What the weights were trained with stands; where they once came from does not matter any more.
    given |= {"pretrained": None, "img_size": prepared.img_size}
    if "interpolation" in given["data"]:
        given["data"] = {**given["data"], "interpolation": prepared.interpolation}
    audit(given, trusted)
    validate(given, trusted)
    builder = Builder(given, trusted)
    sets, _ = builder.data()
    known = class_names(metadata, path)
    if list(sets.class_names) != known:
        raise DataError(f"{sets.name} now has the classes {sets.class_names}, the model knows {known}.")
    artifacts = indexed(folder) or [Artifact("fp32", path, TORCH, 0, 0)]
    return FinishedRun(folder, builder, sets, artifacts, _checkpoints(folder, builder.config, artifacts[0]), trusted)


def _checkpoints(folder: Path, config: dict[str, Any], model: Artifact) -> list[Artifact]:
    """Return the weights in the checkpoints of a run: as trained, and where it averages them the average."""
    averaging = config.get("averaging", {}).get("_target_", "").rsplit(".", 1)[-1].lower()
    found = []
    for file in (BEST, LAST):
        path = folder / MODEL.parent / file
        if path.is_file():
            found.append(dataclasses.replace(model, name=path.stem, path=path, runtime=TORCH))
            if averaging not in ("", "noaveraging"):
                found.append(dataclasses.replace(found[-1], name=f"{path.stem}_{averaging}"))
    return found


def answer(run: FinishedRun, artifact: Artifact, split: str, threads: int, view: View | None = None) -> Answers:
    """Let an artifact answer every picture of a split, in order, read as it itself says.

    Args:
        run: The run.
        artifact: One of its artifacts.
        split: `train`, `val` or `test`.
        threads: CPU threads inside one operator.
        view: What is done to the pictures before; None: nothing.

    Raises:
        DataError: The split is empty, a picture cannot be read, or the file has other classes than the run.
        WeightsError: The file is missing or damaged.
    """
    start = time.perf_counter()
    source, multilabel = run.source(split), run.sets.multilabel
    if not len(source):
        raise DataError(f"split={split} of {run.folder} holds no pictures. Choose another one.")
    parts: list[Tensor] = []
    with _answering(run, artifact, threads) as (forward, metadata, embedded):
        own = class_names(metadata, artifact.path)
        if sorted(own) != sorted(run.sets.class_names):
            raise DataError(f"{artifact.path} knows the classes {own}, {run.folder} {run.sets.class_names}.")
        columns = [own.index(name) for name in run.sets.class_names]
        scale = temperature(metadata, artifact.path)
        with closing(run.builder.loader(run.sets, run.builder.device()).eval_batches(split)) as batches:
            for batch in batches:
                given = forward(batch.images if view is None else view(batch.images))[:, columns]
                parts.append(to_logits(given, scale, multilabel) if embedded else given)
    seconds = time.perf_counter() - start
    logits = torch.cat(parts)
    if artifact in run.checkpoints:  # a checkpoint has no temperature of its own
        if split == "val" and view is None:
            scale = fit_temperature(logits, torch.from_numpy(source.labels), multilabel)
        else:
            scale = answer(run, artifact, "val", threads).temperature
    return Answers(artifact, split, run.sets.class_names, source.names, source.labels, logits, scale, seconds)


@contextmanager
def _answering(
    run: FinishedRun, artifact: Artifact, threads: int
) -> Iterator[tuple[Callable[[Tensor], Tensor], dict[str, str], bool]]:
    """Give what maps uint8 pictures to answers `(B, K)` on the CPU, the file's metadata, and whether it is embedded."""
    if artifact.runtime == TORCH:
        shipped = shipped_by(run, artifact)

        def by_torch(images: Tensor) -> Tensor:
            with torch.inference_mode():
                logits: Tensor = shipped.model(shipped.preprocess(images.to(shipped.device))).float().cpu()
                return logits.clone()

        yield by_torch, shipped.metadata, False
        return
    with closing(worker.in_process(threads, run.trusted)(artifact)) as running:
        yield (
            lambda images: torch.from_numpy(running.run(images.cpu().contiguous().numpy())),
            running.metadata,
            running.embedded,
        )


def shipped_by(run: FinishedRun, artifact: Artifact) -> deployed.Deployed:
    """Load an artifact or checkpoint that PyTorch runs, in eval mode on the run's device.

    Raises:
        WeightsError: The file is missing or damaged, or the checkpoint holds no such weights.
    """
    device, trusted = run.builder.device(), list(run.trusted)
    if artifact not in run.checkpoints:
        return deployed.load_file(artifact.path, device, trusted)
    shipped = deployed.load_file(run.folder / MODEL, device, trusted)
    tensors, _ = CheckpointStore(artifact.path.parent, {}).read(artifact.path.name)
    prefix = "model/" if artifact.name == artifact.path.stem else "average/"
    own = shipped.model.state_dict()
    found = {name: tensors[prefix + name] for name in own if prefix + name in tensors}
    if prefix == "average/" and not found:
        raise WeightsError(f"{artifact.path} holds no average yet. Use artifact={artifact.path.stem}.")
    differing = weights.differences(own, found)
    if differing:
        raise WeightsError(f"{artifact.path} is of another model: {'; '.join(differing[:5])}. Use artifact=fp32.")
    shipped.model.load_state_dict(found)
    return shipped
