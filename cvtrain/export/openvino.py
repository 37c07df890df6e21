"""Export to OpenVINO, Intel's runtime."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from cvtrain.core.artifact import OPENVINO, Artifact
from cvtrain.core.complexity import count_macs, count_params
from cvtrain.export.base import Exporter
from cvtrain.export.check import compare
from cvtrain.export.network import prepare
from cvtrain.export.onnx import write_onnx
from cvtrain.export.writing import asking, reporting, writing
from cvtrain.runtime import loader


class OpenVINO(Exporter):
    """Write the float32 graph as `.xml` with its weights beside it as `.bin`; the two belong together."""

    def __init__(self, embed_preprocessing: bool = False) -> None:
        """See that OpenVINO is there.

        Args:
            embed_preprocessing: Take uint8 pictures as they are read and give probabilities.

        Raises:
            ConfigError: OpenVINO is not installed.
        """
        loader(OPENVINO)
        self.embed_preprocessing = embed_preprocessing

    def export(
        self, model: nn.Module, example: Tensor, folder: Path, metadata: Mapping[str, str], name: str = "model"
    ) -> Artifact:
        """Write `name.xml` and `name.bin` by way of ONNX, and check them.

        Args:
            model: Any device and mode; never changed.
            example: `(1, C, H, W)` float32 normalised input.
            folder: Where the files go; exists.
            metadata: Text for the graph's `rt_info`, as one JSON object.
            name: The files', without their suffixes.

        Returns:
            The `.xml` file, already compared with `model`.

        Raises:
            CvtrainError: The model cannot be exported, or the file does not reproduce it.
            StorageError: The disk is full or read-only.
        """
        backend = loader(OPENVINO)
        path = folder / f"{name}.xml"
        prepared = prepare(model, example, metadata, self.embed_preprocessing)
        with reporting("openvino"), writing(path) as work:
            with tempfile.TemporaryDirectory(dir=work.parent) as temporary:
                source = Path(temporary) / "float.onnx"
                write_onnx(prepared, source)
                with asking("OpenVINO cannot convert this model"):
                    graph = backend.openvino.Core().read_model(source)
                    graph.set_rt_info(json.dumps(prepared.metadata), backend.RT_INFO)
                    backend.openvino.save_model(graph, work, compress_to_fp16=False)
                    del graph  # it maps the file that is about to go
            compare(prepared, work, OPENVINO)
        return Artifact("openvino", path, OPENVINO, count_params(model), count_macs(model, example))
