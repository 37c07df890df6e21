"""cvtrain: config-driven training for computer vision that proves each artifact it ships."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cvtrain.command.predictor import Predictor

__version__ = "0.1.0"

# ONNX Runtime from 1.29 on reports each process to its maker and keeps an identifier of the machine; it looks here when
# it starts, and never again. Whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def load(
    run_or_file: str | os.PathLike[str],
    artifact: str = "auto",
    threads: int | None = None,
    device: str = "auto",
    trusted: Sequence[str] = (),
) -> Predictor:
    """Load a trained model: `cvtrain.load("RUN_FOLDER").predict(["a.jpg"])[0].label`.

    Args:
        run_or_file: A run folder, or a file: model.safetensors, .onnx, …
        artifact: A row of the run's artifacts.csv; `auto`: the run's winner.
        threads: CPU threads inside one operator; None: what the runtime takes.
        device: `auto`, `cpu`, `cuda`, `mps`, for PyTorch networks.
        trusted: Packages of your own that a PyTorch network may come from.

    Raises:
        ConfigError: No run folder, no such artifact or device, or a runtime that is not installed.
        WeightsError: The file is missing or damaged.
    """
    # By its name: the front and the lower layers import this package without what a job needs.
    module = importlib.import_module("cvtrain.command.predictor")
    found: Predictor = module.Predictor(run_or_file, artifact, threads, device, trusted)
    return found
