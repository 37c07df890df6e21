"""Checkpoints: the whole training state as safetensors and JSON, durable, hashed, the previous one kept.

Nothing is pickled. A file's SHA-256 is entered into manifest.json before the file takes its name, so at every moment
each file on the disk is one that the manifest knows; a damaged file is noticed, named and passed over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvtrain.core import distributed, weights
from cvtrain.core.files import (
    is_full,
    sha256,
    storage_error,
    sweep,
    sync_folder,
    write_atomic,
    write_json,
    write_temporary,
)
from cvtrain.engine.run import TrainRun
from cvtrain.errors import ConfigError, DivergedError, StorageError, WeightsError
from cvtrain.runs import CHECKPOINTS

log = logging.getLogger("cvtrain")

LAST, PREVIOUS, BEST = CHECKPOINTS
FORMAT = 2


@dataclass
class CheckpointStore:
    """The `weights/` folder of a run.

    A save copies the training state and returns; one thread writes the copy while training goes on. What reads the
    folder waits for that thread first, and is told what went wrong in it.

    Attributes:
        folder: Exists.
        fixed: Plain JSON stored with every checkpoint: config and its hash, environment, classes, preprocessing.
        accepted: Hashes of the configs that the run had before this one, from which it goes on.
        origin: What was stored with the checkpoint that was restored.
    """

    folder: Path
    fixed: dict[str, Any]
    accepted: Collection[str] = ()
    origin: dict[str, Any] = field(default_factory=dict)
    _whole: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file that this process has written, or read and found whole."""
    committed: Callable[[], object] = lambda: None
    """Called by the writing thread when a checkpoint is on the disk."""
    _writer: threading.Thread | None = None
    _failure: BaseException | None = None

    def save(self, run: TrainRun, best: bool) -> None:
        """Begin to write `last` (and `best` when told so) with everything a resume needs.

        Raises:
            DivergedError: A weight is not finite; the old checkpoint stands.
            StorageError: The save before failed: the disk is full or read-only; the old checkpoint stands.
        """
        self.wait()  # so that there is one copy at most
        tensors = _tensors(run)
        if not weights.all_finite({k: v for k, v in tensors.items() if k.startswith(("model/", "average/"))}):
            raise DivergedError(
                f"weights are not finite at step {run.state.step}; the checkpoint was not written and the "
                f"last good one stands.\n"
                "Lower optimizer.lr, set clip_grad_norm=1.0, or use precision=fp32."
            )
        metadata = {"cvtrain": json.dumps(self._document(run))}
        self._writer = threading.Thread(
            target=self._write, args=(_copies(tensors, run.device), metadata, best), name="checkpoint"
        )
        self._writer.start()

    def wait(self) -> None:
        """Wait until the last save is on the disk.

        Raises:
            StorageError: It is not: the disk is full or read-only; the checkpoint before it stands.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write(self, tensors: dict[str, Tensor], metadata: dict[str, str], best: bool) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
        try:
            try:
                self._commit(tensors, metadata, best)
            except StorageError as error:
                if not is_full(error) or not self._purge():
                    raise
                self._commit(tensors, metadata, best)
            with contextlib.suppress(OSError, StorageError):  # the checkpoint stands all the same
                self.committed()
        except BaseException as error:
            self._failure = error

    def _purge(self) -> bool:
        """Remove the checkpoint before the last one, when that frees its space; return whether it did."""
        path = self.folder / PREVIOUS
        try:
            if LAST not in self._whole or path.stat().st_nlink > 1:  # it may be the best one too
                return False
            path.unlink()
        except OSError:
            return False
        log.warning("checkpoint: the disk is full; trying once more without %s", path)
        return True

    def _commit(self, tensors: dict[str, Tensor], metadata: dict[str, str], best: bool) -> None:
        temporary = write_temporary(self.folder / LAST, weights.pieces(tensors, metadata))
        try:
            # Each name may stand for the file on the disk now, or for the one about to take its place.
            now, digest = self._whole, temporary.digest
            after = {LAST: digest, **({PREVIOUS: now[LAST]} if LAST in now else {}), **({BEST: digest} if best else {})}
            self._enter({name: [new, *([now[name]] if name in now else [])] for name, new in after.items()})
            if LAST in now:  # never a damaged one
                self._link(self.folder / LAST, PREVIOUS)
                now[PREVIOUS] = now[LAST]
            if best:  # before `last`: a kill between the two repeats the epoch, and does not lose its best
                self._link(temporary.path, BEST)
                now[BEST] = digest
            temporary.path.replace(self.folder / LAST)
            now[LAST] = digest
            sync_folder(self.folder)
        except OSError as error:
            raise storage_error(self.folder / LAST, error, temporary.size) from error
        finally:
            sweep(self.folder)

    def record(self, name: str) -> None:
        """Enter a finished file of the folder into the manifest."""
        self.wait()
        self._enter({name: [sha256(self.folder / name)]})

    def restore(self, run: TrainRun) -> str | None:
        """Load the newest whole checkpoint into `run`; return its file name, or None when there is none.

        Raises:
            WeightsError: Files are there, but none is usable.
            ConfigError: The checkpoint is of another config.
        """
        self.wait()
        found = distributed.shared(self._newest)
        if found is None:
            return None
        name, tensors, document = found
        try:
            _load(run, tensors, document, self._replaced(document))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise WeightsError(
                f"{self.folder / name} lacks what this version of cvtrain keeps, or has it otherwise ({error!r}).\n"
                f"Go on with cvtrain {document.get('version', 'of its time')}, or start a new run with resume=none."
            ) from error
        self.origin = document
        return name

    def _newest(self) -> tuple[str, dict[str, Tensor], dict[str, Any]] | None:
        sweep(self.folder)
        names = [name for name in (LAST, PREVIOUS, BEST) if (self.folder / name).exists()]
        digests = {name: sha256(self.folder / name) for name in names}
        self._whole = {name: digest for name, digest in digests.items() if digest in self._known().get(name, [])}
        for name in names:
            try:
                tensors, document = self.read(name)
            except WeightsError as error:
                log.warning("resume: %s; trying the one before", str(error).splitlines()[0])
                continue
            if document.get("config_hash") not in (self.fixed.get("config_hash"), *self.accepted):
                raise ConfigError(
                    f"{self.folder / name} was trained with another config; see args.yaml beside weights/.\n"
                    "Give the same overrides, or start a new run with resume=none."
                )
            for key in ("class_names", "preprocess"):
                if document.get(key) != json.loads(json.dumps(self.fixed.get(key))):
                    raise ConfigError(
                        f"{self.folder / name} was trained with other {key} than this data has.\n"
                        "Bring the data back as it was, or start a new run with resume=none."
                    )
            return name, tensors, document
        if names:
            raise WeightsError(
                f"no usable checkpoint in {self.folder}: all of {', '.join(names)} are damaged. Train again "
                f"without resume=."
            )
        return None

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and document of a checkpoint after checking its hash.

        Raises:
            WeightsError: Missing or damaged.
        """
        self.wait()
        path = self.folder / name
        if not path.is_file():
            raise WeightsError(f"no checkpoint {path}.")
        if sha256(path) not in self._known().get(name, []):
            raise WeightsError(f"{path} is damaged: its SHA-256 is not the one in manifest.json.")
        tensors, metadata = weights.read(path)
        document = weights.parse_metadata(metadata, "cvtrain")
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise WeightsError(f"{path} has another checkpoint format than {FORMAT}.")
        return tensors, document

    def has(self, name: str) -> bool:
        """Return whether the folder has this file."""
        self.wait()
        return distributed.shared((self.folder / name).exists)

    def load_model(self, name: str, model: nn.Module) -> None:
        """Load the weights that a checkpoint would deploy into `model`: the averaged ones where there are any."""
        tensors, _ = distributed.shared(lambda: self.read(name))
        average = _below("average/", tensors)
        model.load_state_dict(
            {key: average[key] for key in model.state_dict()} if average else _below("model/", tensors)
        )

    def keep(self, name: str, document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write `name`.json and `name`.safetensors into the run folder, for people to look at."""
        write_json(self.folder.parent / f"{name}.json", document)
        copies = {key: value.detach().cpu() for key, value in tensors.items()}
        write_atomic(self.folder.parent / f"{name}.safetensors", weights.pieces(copies, {}))

    def _replaced(self, document: dict[str, Any]) -> set[str]:
        """Return the groups that have another option than the checkpoint's, and cannot take back its state."""
        options = [
            {group: config[group]["_target_"] for group in ("scheduler", "precision") if group in config}
            for config in (document.get("config", {}), self.fixed.get("config", {}))
        ]
        return {group for group, option in options[1].items() if options[0].get(group) != option}

    def _document(self, run: TrainRun) -> dict[str, Any]:
        state = run.state
        return {
            "format": FORMAT,
            "epoch": state.epoch,
            "step": state.step,
            "batch": state.batch,
            "seconds": state.seconds,
            "images": state.images,
            "parts": state.parts,
            "logged": state.logged,
            "history": state.history,
            "schedule": run.schedule.state(),
            "precision": run.precision.state(),
            "optimizer_scalars": _optimizer_scalars(run),
            **self.fixed,
        }

    def _known(self) -> dict[str, list[str]]:
        try:
            files = json.loads((self.folder / "manifest.json").read_text())["files"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return files if isinstance(files, dict) else {}

    def _enter(self, digests: dict[str, list[str]]) -> None:
        files = {**self._known(), **digests}
        write_json(self.folder / "manifest.json", {"algorithm": "sha256", "files": files})

    def _link(self, source: Path, target: str) -> None:
        temporary = self.folder / f".{target}.tmp-{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        try:
            temporary.hardlink_to(source)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)
        temporary.replace(self.folder / target)


def _parameter_names(run: TrainRun) -> list[tuple[str, Tensor]]:
    return [
        (name, p)
        for group in run.optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    ]


def _tensors(run: TrainRun) -> dict[str, Tensor]:
    tensors = {f"model/{name}": value for name, value in run.model.state_dict().items()}
    for name, parameter in _parameter_names(run):
        for key, value in run.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
    tensors |= {f"average/{name}": value for name, value in run.averaging.tensors().items()}
    tensors["state/sums"] = run.state.rows()
    return tensors


def _copies(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return copies on the CPU, laid out as they are, which the next step does not change."""
    copies = {name: t.detach().to("cpu", copy=True, non_blocking=True) for name, t in tensors.items()}
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return copies


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _optimizer_scalars(run: TrainRun) -> dict[str, dict[str, Any]]:
    return {
        name: scalars
        for name, parameter in _parameter_names(run)
        if (scalars := {k: v for k, v in run.optimizer.state.get(parameter, {}).items() if not isinstance(v, Tensor)})
    }


def _load(run: TrainRun, tensors: dict[str, Tensor], document: dict[str, Any], replaced: Collection[str]) -> None:
    own = run.model.state_dict()
    stored = _below("model/", tensors)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in stored.items()}:
        raise WeightsError(
            "the checkpoint is of another model. Start a new run, or use the model= it was trained with."
        )
    run.model.load_state_dict(stored)
    for name, parameter in _parameter_names(run):
        values: dict[str, Any] = {
            key: _optimizer_value(value, parameter) for key, value in _below(f"optimizer/{name}/", tensors).items()
        }
        values |= document["optimizer_scalars"].get(name, {})
        if values:
            run.optimizer.state[parameter] = values
    run.averaging.load_tensors(_below("average/", tensors))
    state = run.state
    state.epoch, state.step, state.batch = document["epoch"], document["step"], document["batch"]
    state.seconds, state.images, state.history = document["seconds"], document["images"], document["history"]
    state.logged, state.parts = document["logged"], document["parts"]
    state.load_sums(tensors["state/sums"])
    run.monitor.replay(state.history)
    if "scheduler" not in replaced:
        run.schedule.load_state(document["schedule"])
    if "precision" not in replaced:
        run.precision.load_state(document["precision"])


def _optimizer_value(value: Tensor, parameter: Tensor) -> Tensor:
    if value.shape == parameter.shape:  # moments follow their parameter's device and memory format
        return torch.empty_like(parameter).copy_(value)
    return value.to(parameter.device)


class SharedCheckpoints(CheckpointStore):
    """The store of a process that leaves writing to the first one; what is read comes from there."""

    def save(self, run: TrainRun, best: bool) -> None:
        """Give the first process what only this one knows."""
        run.state.rows()

    def record(self, name: str) -> None:
        """Do nothing."""

    def keep(self, name: str, document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Do nothing."""


class NoCheckpoints(CheckpointStore):
    """Saves nothing: for a fit inside another run, whose checkpoints stand."""

    def __init__(self) -> None:
        super().__init__(Path(), {})

    def save(self, run: TrainRun, best: bool) -> None:
        """Do nothing."""

    def keep(self, name: str, document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Do nothing."""
