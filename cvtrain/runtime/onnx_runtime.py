"""ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from cvtrain.errors import WeightsError
from cvtrain.runtime.archive import in_parts
from cvtrain.runtime.base import Loaded


def load(path: Path, threads: int) -> Loaded:
    """Load a `.onnx` file; one that takes a single picture only is run picture by picture.

    Args:
        path: The file, whose `metadata_props` describe it.
        threads: Threads inside one operator.

    Raises:
        WeightsError: The file is missing or damaged.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    # Idle workers spin by default and would take a core from the artifact that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["?"])[0][:300]
        raise WeightsError(f"ONNX Runtime cannot load {path} ({reason}). Export it again.") from error
    source, target = session.get_inputs()[0], session.get_outputs()[0].name
    fixed = source.shape[0]

    def forward(pixels: NDArray[Any]) -> NDArray[Any]:
        logits: NDArray[Any] = session.run([target], {source.name: pixels})[0]
        return logits

    metadata = dict(session.get_modelmeta().custom_metadata_map)
    answer = in_parts(forward, fixed) if isinstance(fixed, int) else forward
    return Loaded(answer, metadata, metadata.get("embedded") == "true")
