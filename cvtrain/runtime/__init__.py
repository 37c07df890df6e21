"""Artifacts in their own runtimes, without the training code; torch-free until a runtime needs torch."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from cvtrain.core.runtimes import ONNXRUNTIME, OPENVINO, TENSORRT, TORCH_EXPORT, TORCHSCRIPT
from cvtrain.errors import ConfigError, did_you_mean
from cvtrain.runtime.base import Loaded, Running, Start

__all__ = ["Loaded", "Running", "Start", "load", "loader"]

_MODULES = {
    ONNXRUNTIME: "onnx_runtime",
    TORCH_EXPORT: "torch_export",
    TORCHSCRIPT: "torchscript",
    OPENVINO: "openvino",
    TENSORRT: "tensorrt",
}


def loader(runtime: str) -> Any:  # noqa: ANN401 - a module
    """Import the module of `runtime`, and with it the library that runs it.

    Raises:
        ConfigError: Unknown, or its library is not installed.
    """
    if runtime not in _MODULES:
        raise ConfigError(f"unknown runtime {runtime!r}; {did_you_mean(runtime, _MODULES, 'runtimes')}")
    return importlib.import_module(f"cvtrain.runtime.{_MODULES[runtime]}")


def load(runtime: str, path: Path, threads: int) -> Loaded:
    """Load an artifact from its file.

    Args:
        runtime: One of `core.runtimes.RUNTIMES`, but not `torch`, whose files need the training code to rebuild a
            network (`cvtrain.command.worker`).
        path: The file.
        threads: Threads inside one operator.

    Raises:
        ConfigError: An unknown runtime, or its library is not installed.
        WeightsError: The file is missing or damaged.
    """
    loaded: Loaded = loader(runtime).load(path, threads)
    return loaded
