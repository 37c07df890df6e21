"""Export to OpenVINO, Intel's runtime."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from cvtrain.core.artifact import OPENVINO
from cvtrain.export.check import BATCH_SIZES
from cvtrain.export.graph import GraphExporter
from cvtrain.export.network import Prepared
from cvtrain.export.onnx import write_onnx
from cvtrain.export.writing import asking
from cvtrain.runtime import loader


class OpenVINO(GraphExporter):
    """Write the float32 graph, by way of ONNX, as `.xml` with its weights beside it as `.bin`; the two belong together.

    The metadata are one JSON object in the graph's `rt_info`.
    """

    option, runtime, suffix = "openvino", OPENVINO, ".xml"

    def __init__(self, embed_preprocessing: bool = False) -> None:
        """See that OpenVINO is there.

        Args:
            embed_preprocessing: Take uint8 pictures as they are read and give probabilities.

        Raises:
            ConfigError: OpenVINO is not installed.
        """
        loader(OPENVINO)
        super().__init__(embed_preprocessing)

    def _write(self, prepared: Prepared, path: Path) -> tuple[int, ...]:
        backend = loader(OPENVINO)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            source = Path(temporary) / "float.onnx"
            write_onnx(prepared, source)
            with asking("OpenVINO cannot convert this model"):
                graph = backend.openvino.Core().read_model(source)
                graph.set_rt_info(json.dumps(prepared.metadata), backend.RT_INFO)
                backend.openvino.save_model(graph, path, compress_to_fp16=False)
                del graph  # it maps the file that is about to go
        return BATCH_SIZES
