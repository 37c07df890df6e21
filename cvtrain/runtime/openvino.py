"""OpenVINO on the CPU; importing this module imports OpenVINO."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cvtrain.core.extras import import_extra
from cvtrain.core.runtimes import OPENVINO
from cvtrain.runtime.archive import loading
from cvtrain.runtime.base import Loaded

RT_INFO = ["cvtrain"]
"""Where in the graph's runtime information the metadata stand, as one JSON object."""


# It would report each import to its maker. A name that stands for None cannot be imported: OpenVINO takes a stub.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
openvino = import_extra("openvino", "export=openvino", "openvino")


def load(path: Path, threads: int) -> Loaded:
    """Load a `.xml` file with the `.bin` beside it, to be run in float32.

    Args:
        path: The `.xml` file.
        threads: Threads of one inference.

    Raises:
        WeightsError: A file is missing or damaged.
    """
    # By default a CPU that can computes in bfloat16, which has three digits.
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    with loading(path, OPENVINO):
        core = openvino.Core()
        graph = core.read_model(path)
        metadata: dict[str, str] = json.loads(graph.get_rt_info(RT_INFO).astype(str))
        request = core.compile_model(graph, "CPU", settings).create_infer_request()

    def forward(pixels: NDArray[Any]) -> NDArray[Any]:
        answers: NDArray[Any] = request.infer([pixels], share_inputs=True)[0]
        return answers

    return Loaded(forward, metadata, metadata.get("embedded") == "true")
