"""Checkpoints: the whole training state as safetensors and JSON, durable, hashed, the previous one kept.

Nothing is pickled. A file's SHA-256 is entered into manifest.json before the file takes its name, so at every moment
each file on the disk is one that the manifest knows; a damaged file is noticed, named and passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvtrain.core import weights
from cvtrain.core.files import sha256, storage_error, sync_folder, write_json, write_temporary
from cvtrain.engine.run import TrainRun
from cvtrain.errors import ConfigError, DivergedError, WeightsError

log = logging.getLogger("cvtrain")

LAST, PREVIOUS, BEST = "last.safetensors", "last.previous.safetensors", "best.safetensors"
FORMAT = 1


@dataclass
class CheckpointStore:
    """The `weights/` folder of a run.

    Attributes:
        folder: Exists.
        fixed: Plain JSON stored with every checkpoint: config hash, classes, preprocessing.
    """

    folder: Path
    fixed: dict[str, Any]
    _whole: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file that this process has written, or read and found whole."""

    def save(self, run: TrainRun, best: bool) -> None:
        """Write `last` (and `best` when told so) with everything a resume needs.

        Raises:
            DivergedError: A weight is not finite; the old checkpoint stands.
            StorageError: The disk is full or read-only; the old checkpoint stands.
        """
        tensors = _tensors(run)
        if not weights.all_finite({k: v for k, v in tensors.items() if k.startswith("model/")}):
            raise DivergedError(
                f"weights are not finite at step {run.state.step}; the checkpoint was not written and the "
                f"last good one stands.\n"
                "Lower optimizer.lr, set clip_grad_norm=1.0, or use precision=fp32."
            )
        content = weights.to_bytes(tensors, {"cvtrain": json.dumps(self._document(run))})
        temporary = write_temporary(self.folder / LAST, content)
        digest = hashlib.sha256(content).hexdigest()
        try:
            # Each name may stand for the file on the disk now, or for the one about to take its place.
            now = self._whole
            after = {LAST: digest, **({PREVIOUS: now[LAST]} if LAST in now else {}), **({BEST: digest} if best else {})}
            self._enter({name: [new, *([now[name]] if name in now else [])] for name, new in after.items()})
            if LAST in now:  # never a damaged one
                self._link(self.folder / LAST, PREVIOUS)
            if best:  # before `last`: a kill between the two repeats the epoch, and does not lose its best
                self._link(temporary, BEST)
            temporary.replace(self.folder / LAST)
            sync_folder(self.folder)
            self._whole |= after
        except OSError as error:
            raise storage_error(self.folder / LAST, error, len(content)) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def record(self, name: str) -> None:
        """Enter a finished file of the folder into the manifest."""
        self._enter({name: [sha256(self.folder / name)]})

    def restore(self, run: TrainRun) -> str | None:
        """Load the newest whole checkpoint into `run`; return its file name, or None when there is none.

        Raises:
            WeightsError: Files are there, but none is usable.
            ConfigError: The checkpoint is of another config.
        """
        self.sweep()
        names = [name for name in (LAST, PREVIOUS, BEST) if (self.folder / name).exists()]
        digests = {name: sha256(self.folder / name) for name in names}
        self._whole = {name: digest for name, digest in digests.items() if digest in self._known().get(name, [])}
        for name in names:
            try:
                tensors, document = self.read(name)
            except WeightsError as error:
                log.warning("resume: %s; trying the one before", str(error).splitlines()[0])
                continue
            if document.get("config_hash") != self.fixed.get("config_hash"):
                raise ConfigError(
                    f"{self.folder / name} was trained with another config; see args.yaml beside weights/.\n"
                    "Give the same overrides, or start a new run with resume=none."
                )
            _load(run, tensors, document)
            return name
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

    def load_model(self, name: str, model: nn.Module) -> None:
        """Load only the weights of a checkpoint into `model`."""
        tensors, _ = self.read(name)
        model.load_state_dict(_model_tensors(tensors))

    def sweep(self) -> None:
        """Remove temporary files that a killed process left."""
        for path in self.folder.glob(".*.tmp-*"):
            with contextlib.suppress(OSError):
                path.unlink()

    def _document(self, run: TrainRun) -> dict[str, Any]:
        state = run.state
        return {
            "format": FORMAT,
            "epoch": state.epoch,
            "step": state.step,
            "batch": state.batch,
            "seconds": state.seconds,
            "images": state.images,
            "history": state.history,
            "monitor": run.monitor.state(),
            "schedule": run.schedule.state(),
            "precision": run.precision.state(),
            "threads": torch.get_num_threads(),
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
    tensors["state/sums"] = run.state.sums
    return tensors


def _model_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}


def _optimizer_scalars(run: TrainRun) -> dict[str, dict[str, Any]]:
    return {
        name: scalars
        for name, parameter in _parameter_names(run)
        if (scalars := {k: v for k, v in run.optimizer.state.get(parameter, {}).items() if not isinstance(v, Tensor)})
    }


def _load(run: TrainRun, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
    own = run.model.state_dict()
    stored = _model_tensors(tensors)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in stored.items()}:
        raise WeightsError(
            "the checkpoint is of another model. Start a new run, or use the model= it was trained with."
        )
    run.model.load_state_dict(stored)
    for name, parameter in _parameter_names(run):
        prefix = f"optimizer/{name}/"
        values: dict[str, Any] = {
            key.removeprefix(prefix): _optimizer_value(key.removeprefix(prefix), value, parameter)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        values |= document["optimizer_scalars"].get(name, {})
        if values:
            run.optimizer.state[parameter] = values
    state = run.state
    state.epoch, state.step, state.batch = document["epoch"], document["step"], document["batch"]
    state.seconds, state.images, state.history = document["seconds"], document["images"], document["history"]
    state.sums.copy_(tensors["state/sums"])
    run.monitor.load_state(document["monitor"])
    run.schedule.load_state(document["schedule"])
    run.precision.load_state(document["precision"])


def _optimizer_value(key: str, value: Tensor, parameter: Tensor) -> Tensor:
    if value.shape == parameter.shape:  # moments follow their parameter's device and memory format
        return torch.empty_like(parameter).copy_(value)
    return value.to(parameter.device)


class NoCheckpoints(CheckpointStore):
    """Saves nothing: for a fit inside another run, whose checkpoints stand."""

    def __init__(self) -> None:
        super().__init__(Path(), {})

    def save(self, run: TrainRun, best: bool) -> None:
        """Do nothing."""
