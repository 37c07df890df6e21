"""Loading an artifact fresh from its file, in the runtime it is made for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cvtrain.core.artifact import ONNXRUNTIME, TORCH, Artifact
from cvtrain.core.weights import load_into
from cvtrain.errors import ConfigError, WeightsError

Runner = Callable[[Tensor], Tensor]
"""Maps float32 normalised `(B, C, H, W)` to float32 logits `(B, K)`, both on the CPU."""


def load_runner(artifact: Artifact, threads: int) -> Runner:
    """Load an artifact from its file.

    Args:
        artifact: What to load. Nothing but the architecture is taken from `artifact.model`.
        threads: Threads inside one operator, for ONNX Runtime; PyTorch's are set for the whole process.

    Returns:
        The loaded artifact as a function.

    Raises:
        WeightsError: The file is missing or damaged.
        ConfigError: An unknown runtime, or a `torch` artifact without a model.
    """
    if artifact.runtime == TORCH:
        return _load_torch(artifact)
    if artifact.runtime == ONNXRUNTIME:
        return _load_onnx(artifact.path, threads)
    raise ConfigError(
        f"artifact {artifact.name!r}: unknown runtime {artifact.runtime!r}; known: {TORCH}, {ONNXRUNTIME}"
    )


def _load_torch(artifact: Artifact) -> Runner:
    if artifact.model is None:
        raise ConfigError(f"artifact {artifact.name!r}: the {TORCH} runtime needs a model to load the weights into")
    model = copy.deepcopy(artifact.model).cpu()
    load_into(model, artifact.path)
    model.eval()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(images)
            return logits.float()

    return run


def _load_onnx(path: Path, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Idle workers spin by default and would take a core from the artifact that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["?"])[0][:300]
        raise WeightsError(f"ONNX Runtime cannot load {path} ({reason}). Export it again.") from error
    source, target = session.get_inputs()[0], session.get_outputs()[0].name
    fixed = source.shape[0] if isinstance(source.shape[0], int) else None

    def run(images: Tensor) -> Tensor:
        pixels = images.numpy()
        if fixed is None or fixed == len(pixels):
            return torch.from_numpy(session.run([target], {source.name: pixels})[0])
        parts = [session.run([target], {source.name: pixels[i : i + 1]})[0] for i in range(len(pixels))]
        return torch.from_numpy(np.concatenate(parts))

    return run
