"""Starting artifacts, in child processes or in this one; also what a child runs.

Torch is imported only for artifacts that need it: a child with an ONNX file starts in half a second.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from safetensors import safe_open

from cvtrain import runtime as runtimes
from cvtrain.core.runtimes import TORCH
from cvtrain.errors import WeightsError
from cvtrain.runtime.base import Loaded, Running, Start
from cvtrain.runtime.server import Worker, end_with, serve
from cvtrain.runtime.session import Session, forget_peak, peak_mb

if TYPE_CHECKING:
    from cvtrain.core.artifact import Artifact

_LATE_IMPORTS = {"cvtrain.model.torchvision_model": "torchvision.models", "cvtrain.model.timm_model": "timm"}
"""Libraries that are imported while a network is built; they are no part of the memory it takes."""


def isolated(threads: int, trusted: Sequence[str] = ()) -> Start:
    """Return what starts an artifact in a child process of its own.

    Args:
        threads: Threads inside one operator.
        trusted: The user's own packages.
    """
    return lambda artifact: Worker(artifact, threads, trusted)


def in_process(threads: int, trusted: Sequence[str] = ()) -> Start:
    """Return what starts an artifact in this process, for when there is nothing to compare it with.

    Args:
        threads: Threads inside one operator; torch has its own number back when the artifact is closed.
        trusted: The user's own packages.
    """

    def start(artifact: Artifact) -> Running:
        import torch

        before = torch.get_num_threads()
        try:
            loaded = load(artifact.runtime, artifact.path, threads, trusted)
            return Session(loaded, artifact.path, closing=lambda: torch.set_num_threads(before))
        except BaseException:
            torch.set_num_threads(before)
            raise

    return start


def load(runtime: str, path: Path, threads: int, trusted: Sequence[str] = ()) -> Loaded:
    """Load an artifact from its file, whatever runs it.

    Args:
        runtime: One of `core.runtimes.RUNTIMES`.
        path: The file.
        threads: Threads inside one operator; torch's are set for the whole process.
        trusted: The user's own packages.

    Raises:
        ConfigError: An unknown runtime, one that is not installed, or a network that is not allowed.
        WeightsError: The file is missing or damaged.
    """
    if not path.is_file():
        raise WeightsError(f"no file at {path}. Export it again.")
    return _load_torch(path, threads, trusted) if runtime == TORCH else runtimes.load(runtime, path, threads)


def _load_torch(path: Path, threads: int, trusted: Sequence[str]) -> Loaded:
    import torch

    from cvtrain.command import deployed

    torch.set_num_threads(threads)
    # In the plain memory format: what everything else is compared with is PyTorch as it comes.
    shipped = deployed.load_file(path, torch.device("cpu"), list(trusted), channels_last=False)

    def forward(pixels: NDArray[Any]) -> NDArray[Any]:
        with torch.inference_mode():
            logits: NDArray[Any] = shipped.model(torch.from_numpy(pixels)).float().numpy()
            return logits

    return Loaded(forward, shipped.metadata)


def main(descriptor: str, parent: str) -> None:
    """Be the child of a `runtime.server.Worker`.

    Args:
        descriptor: Number of the open file that leads to the parent.
        parent: The parent's process number.
    """
    end_with(int(parent))
    with Connection(int(descriptor)) as connection:
        serve(connection, _start)


def _start(runtime: str, path: Path, threads: int, trusted: Sequence[str]) -> Running:
    _import(runtime, path)
    forget_peak()
    before = peak_mb()
    return Session(load(runtime, path, threads, trusted), path, before)


def _import(runtime: str, path: Path) -> None:
    """Import what runs the file, so that its memory is not taken for the file's."""
    if runtime != TORCH:
        runtimes.loader(runtime)
        return
    importlib.import_module("cvtrain.command.deployed")
    with contextlib.suppress(Exception):  # whatever is wrong, loading the file says so
        with safe_open(path, framework="np") as file:
            target = json.loads(file.metadata()["model"])["_target_"]
        importlib.import_module(_LATE_IMPORTS[target])
