"""After training: compress, export, and prove every file in its own runtime and process."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor, nn

from cvtrain.build import Builder, lay_out
from cvtrain.command import worker
from cvtrain.command.finetuning import Recipe
from cvtrain.command.results import write_csv
from cvtrain.compression import Chain, artifact_file
from cvtrain.core import weights
from cvtrain.core.artifact import TORCH, Artifact, Compressed, CompressionContext
from cvtrain.core.channel_plan import plan_of
from cvtrain.core.complexity import count_macs, count_params
from cvtrain.core.files import write_atomic
from cvtrain.core.index import INDEX as INDEX
from cvtrain.core.index import REFERENCE as REFERENCE
from cvtrain.core.types import DataSets
from cvtrain.engine.memory import out_of_memory
from cvtrain.engine.run import TrainRun
from cvtrain.errors import CvtrainError, Interrupted, OutOfMemoryError, StorageError
from cvtrain.evaluation import EvaluationSet, ProofRow, prove, write_artifacts_csv
from cvtrain.evaluation.table import weigh
from cvtrain.evaluation.verdict import Limits, Verdict, check_gate, judge, remarks
from cvtrain.export import Exporter, export_onnx, write_preprocess
from cvtrain.report.console import artifacts_table

log = logging.getLogger("cvtrain")


class Training(Protocol):
    """What compression may ask of the training; see `finetuning.Recipe`."""

    def finetune(self, model: nn.Module, epochs: int, lr: float, teacher: nn.Module | None) -> None:
        """Train `model` in place."""
        ...

    def evaluate(self, model: nn.Module) -> float:
        """Return the share of right answers on the validation set."""
        ...

    def backward(self, model: nn.Module, batches: int) -> None:
        """Add gradients of so many batches."""
        ...

    def calibration(self) -> Iterator[Tensor]:
        """Yield training pictures."""
        ...


@dataclass(frozen=True)
class Subject:
    """A model, and what its artifacts are made with and judged on.

    Attributes:
        model: On the CPU, contiguous, in eval mode; never changed.
        example: `(1, C, H, W)` float32, the shape of its input.
        folder: Where `weights/model.safetensors` lies, and the artifacts go.
        metadata: What every file carries, as text.
        training: What compression may ask for.
        evaluation: The pictures to judge on.
        pictures: What they are, for the table: "359 test pictures".
        network: What is exported first in place of `model`, and its label: `("pruned", the pruned network)`.
        check_stop: Raises Interrupted when a signal has asked to stop.
    """

    model: nn.Module
    example: Tensor
    folder: Path
    metadata: Mapping[str, str]
    training: Training
    evaluation: EvaluationSet
    pictures: str
    network: tuple[str, nn.Module] | None = None
    check_stop: Callable[[], None] = lambda: None

    def carried(self, network: nn.Module, given: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return what the file of a network made of `model` carries: `given`, and which channels it has lost."""
        plan = plan_of(self.model, network)
        return {**self.metadata, **(given or {}), **({"channel_plan": json.dumps(plan)} if plan else {})}

    def context(self) -> CompressionContext:
        """Return what compression steps work with; their folder is made."""
        folder = self.folder / "compressed"
        folder.mkdir(exist_ok=True)
        return CompressionContext(
            folder=folder,
            example=self.example,
            calibration=self.training.calibration,
            finetune=self.training.finetune,
            evaluate=self.training.evaluate,
            backward=self.training.backward,
            save_weights=lambda network, path, given: weights.save_weights(network, path, self.carried(network, given)),
            export_onnx=lambda network, path: export_onnx(network, self.example, path, self.metadata),
        )


@dataclass
class Made:
    """Files on their way to the proof.

    Attributes:
        index: The artifacts.csv of those that were there before.
        reference: The float model's.
        artifacts: The others, in the order of the table.
        failures: What went wrong with those that are missing.
        retries: By artifact: makes its file again in another way, and gives None where there is none.
    """

    index: Path
    reference: Artifact
    artifacts: list[Artifact] = field(default_factory=list)
    failures: list[CvtrainError] = field(default_factory=list)
    retries: dict[str, Callable[[], Artifact | None]] = field(default_factory=dict)

    def add(self, artifact: Artifact) -> None:
        """Put `artifact` at the end, or in the place of the one of the same name."""
        names = [known.name for known in self.artifacts]
        if artifact.name in names:
            self._forget([artifact.name])
            self.artifacts.insert(names.index(artifact.name), artifact)
        else:
            self.artifacts.append(artifact)

    def withdraw(self, name: str) -> list[tuple[Artifact, str]]:
        """Take `name`, its stages and what was made of them out of the table, as their files are about to be written.

        Returns:
            What was taken out, each with the SHA-256 of its file.
        """
        kin = re.compile(rf"{re.escape(name)}[\d.]*(\+.*)?")
        gone = [known for known in self.artifacts if kin.fullmatch(known.name)]
        stale = [known.name for known in gone if known.name != name]
        if stale:
            log.info("artifacts: %s belong to the earlier %s and leave the table", ", ".join(stale), name)
        self._forget([known.name for known in gone])
        return [(known, weigh(known.path).sha256) for known in gone if known.path.is_file()]

    def restore(self, withdrawn: Sequence[tuple[Artifact, str]]) -> None:
        """Put back what was withdrawn and whose file is still the same."""
        self.artifacts += [
            known for known, digest in withdrawn if known.path.is_file() and weigh(known.path).sha256 == digest
        ]

    def _forget(self, names: Sequence[str]) -> None:
        self.artifacts = [known for known in self.artifacts if known.name not in names]
        if names and self.index.is_file():  # until the proof is done it must not name what may change
            with self.index.open(newline="") as file:
                header, *rows = csv.reader(file)
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([header, *(row for row in rows if row[0] not in names)])
            write_atomic(self.index, text.getvalue())


@dataclass(frozen=True)
class Proved:
    """What the proof found.

    Attributes:
        rows: Of artifacts.csv, the reference first.
        pictures: What they were judged on.
        verdict: Which of them to deploy.
        failures: What went wrong with those that are missing.
    """

    rows: list[ProofRow]
    pictures: str
    verdict: Verdict
    failures: list[CvtrainError]

    @property
    def table(self) -> list[dict[str, Any]]:
        """Return the rows as plain values."""
        return [dataclasses.asdict(row) for row in self.rows]

    def show(self, console: Console, threads: int) -> None:
        """Print the table, which artifact to deploy, and where compression did not pay."""
        table = self.table
        console.print(artifacts_table(self.rows, self.pictures, threads, self.verdict.winner))
        if len(table) > 1 or self.verdict.winner is None:
            console.print(self.verdict.sentence, style="bold", markup=False)
        for remark in remarks(table):
            console.print(remark, style="yellow", markup=False)

    def settle(self, gate: Limits) -> None:
        """End well, or with the first of the failures, or with a missed gate.

        Raises:
            CvtrainError: An artifact is missing.
            GateError: The winner misses the gate.
        """
        if self.failures:
            raise self.failures[0]
        check_gate(self.table, self.verdict, gate)


def subject_of(builder: Builder, run: TrainRun, sets: DataSets, folder: Path, metadata: Mapping[str, str]) -> Subject:
    """Return a trained run as what artifacts are made of; its model moves to the CPU.

    Args:
        builder: Of the run's config.
        run: Trained, with the weights to deploy, which are in `weights/model.safetensors` too.
        sets: Its data.
        folder: The run folder.
        metadata: What every file carries.
    """
    limit = run.options.limit_eval_batches
    seen = len(sets.test) if limit is None else min(len(sets.test), limit * builder.config["batch_size"])

    def labelled() -> Iterator[tuple[Tensor, Tensor]]:
        with closing(run.loader.eval_batches("test", limit=limit)) as batches:
            for batch in batches:
                yield batch.images, batch.targets

    return Subject(
        model=lay_out(run.model, torch.device("cpu"), channels_last=False).eval(),
        example=torch.zeros(1, *run.preprocess.shape),
        folder=folder,
        metadata=metadata,
        training=Recipe(builder, run, sets.class_names),
        evaluation=EvaluationSet(labelled, sets.class_names, run.task.decide),
        pictures=f"{seen:,} test pictures",
        check_stop=run.stop.check_here,
    )


def forget_artifacts(folder: Path) -> None:
    """Remove the table of a run folder and its picture, before the model that they are about is written anew."""
    for name in (INDEX, "artifacts.png"):
        (folder / name).unlink(missing_ok=True)


def reference_of(subject: Subject) -> Artifact:
    """Return the float model's own file as an artifact."""
    model = subject.model
    path = subject.folder / "weights" / "model.safetensors"
    return Artifact(REFERENCE, path, TORCH, count_params(model), count_macs(model, subject.example))


def make_and_prove(builder: Builder, subject: Subject, index: Sequence[Artifact] = ()) -> Proved:
    """Compress and export a model, prove every file, and write artifacts.csv and, of several, artifacts.png.

    One file that fails does not lose the others: it has no row, and its failure is returned.

    Args:
        builder: Its config says what to make (`compression`, `export`), and has the `budget`.
        subject: The model.
        index: Artifacts that are there already, the reference first; those of the same name are replaced.

    Raises:
        DivergedError: The float model's answers are not finite.
        StorageError: The disk is full.
        Interrupted: A signal asked to stop.
    """
    made = Made(subject.folder / INDEX, index[0] if index else reference_of(subject), list(index[1:]))
    make(builder, subject, made)
    rows = _proved(builder, subject, made)
    folder, table = subject.folder, [dataclasses.asdict(row) for row in rows]
    write_artifacts_csv(rows, folder / INDEX)
    verdict = judge(table, builder.config["budget"])
    if len(rows) > 1:
        from cvtrain.report import plots  # matplotlib: a run without pictures need not wait for it

        plots.artifacts(rows, folder / "artifacts.png", verdict.winner)
    return Proved(rows, subject.pictures, verdict, made.failures)


def make(builder: Builder, subject: Subject, made: Made) -> None:
    """Add what `compression` and `export` ask for: exports, compressed files, and exports of the smaller network."""
    exporters = builder.build_each("export")
    label, network = subject.network or ("", subject.model)
    _export(exporters, subject, label, network, made)
    steps = builder.build_each("compression")
    if not steps:
        return
    log.info("compression: %s", ", then ".join(steps))
    chain = Chain(subject.model, subject.context())
    for option, step in steps.items():
        before = made.withdraw(chain.name_of(step))
        with _noted(subject, made.failures, f"compression={option}"):
            done = chain.apply(step)
            before = []
            for artifact in done.artifacts:
                made.add(artifact)
            _write_details(done, subject.folder / "compressed")
        made.restore(before)
    if chain.smaller is not None:
        _export(exporters, subject, *chain.smaller, made)


def _export(exporters: Mapping[str, Exporter], subject: Subject, label: str, network: nn.Module, made: Made) -> None:
    """Add an export of `network` by each exporter; `label` names it where it is not the model itself."""
    folder = subject.folder / "export"
    stem = label.replace("+", "_") or "model"
    carried = subject.carried(network)

    given = network, subject.example, folder, carried, stem

    def named(artifact: Artifact) -> Artifact:
        return dataclasses.replace(artifact, name=f"{label}+{artifact.name}", exact=False) if label else artifact

    def again(exporter: Exporter) -> Artifact | None:
        other = exporter.retry(*given)
        return None if other is None else named(other)

    for option, exporter in exporters.items():
        log.info("export: %s%s", option, f" of {label}" * bool(label))
        folder.mkdir(exist_ok=True)
        write_preprocess(folder, subject.metadata)
        with _noted(subject, made.failures, f"export={option}"):
            artifact = named(exporter.export(*given))
            if artifact.runtime == TORCH:  # the same weights again: one row, of the file that is meant to be given away
                _give_away(made, label, artifact.path)
                continue
            made.add(artifact)
            if hasattr(exporter, "retry"):  # a user's own may have none
                made.retries[artifact.name] = partial(again, exporter)


def _give_away(made: Made, label: str, path: Path) -> None:
    if not label:
        made.reference = dataclasses.replace(made.reference, path=path)
    made.artifacts = [dataclasses.replace(a, path=path) if a.name == label else a for a in made.artifacts]


def _write_details(done: Compressed, folder: Path) -> None:
    """Write what a step did to each layer, its masks, and what each of its stages cost."""
    from cvtrain.report import compression as pictures

    name = done.artifacts[-1].name
    write_csv(folder / artifact_file(name, "_layers.csv"), list(done.layers))
    if done.model is not None and not done.smaller:
        pictures.masks(done.model, folder / artifact_file(name, "_masks.png"))
    if done.tradeoff:
        rows = [dataclasses.asdict(point) for point in done.tradeoff]
        write_csv(folder / artifact_file(name, "_tradeoff.csv"), rows)
        pictures.tradeoff(done.tradeoff, folder / artifact_file(name, "_tradeoff.png"), name)


def _proved(builder: Builder, subject: Subject, made: Made) -> list[ProofRow]:
    """Return the rows of what passed, in order; an export that fails is made in its other way, and proved once more."""
    threads, config = torch.get_num_threads(), builder.config
    # A process of its own costs seconds, and where nothing else was made there is nothing to compare with.
    isolate = bool(made.artifacts or config["export"] or config["compression"])
    start = (worker.isolated if isolate else worker.in_process)(threads, builder.trusted)
    proof = prove(made.reference, made.artifacts, subject.evaluation, start, run_folder=subject.folder)
    subject.check_stop()
    rows = {row.artifact: row for row in proof.rows}
    for artifact, error in proof.failures:
        with _noted(subject, made.failures, artifact.name):
            log.warning("%s", error)
            other = made.retries.get(artifact.name, lambda: None)()
            if other is None:
                raise error
            log.info("%s: written once more, by another exporter", artifact.name)
            again = prove(made.reference, [other], subject.evaluation, start, run_folder=subject.folder)
            if again.failures:
                raise again.failures[0][1]
            rows[artifact.name] = again.rows[1]
            made.add(other)
    order = [made.reference.name, *(artifact.name for artifact in made.artifacts)]
    return [rows[name] for name in order if name in rows]


@contextmanager
def _noted(subject: Subject, failures: list[CvtrainError], what: str) -> Iterator[None]:
    """Let the other artifacts be made when one fails; a request to stop and a full disk end the run at once."""
    failed: CvtrainError | None = None
    try:
        yield
    except (Interrupted, StorageError):
        raise
    except CvtrainError as error:
        failed = error
    except Exception as error:
        if not out_of_memory(error):
            raise
        failed = OutOfMemoryError(f"{what}: memory ran out.\nLower batch_size, or leave it out.")
        lay_out(subject.model, torch.device("cpu"), channels_last=False)
    subject.check_stop()  # libraries take the exception of a signal for a failure of their own
    if failed is not None:
        log.warning("%s failed: %s", what, failed)
        failures.append(failed)
