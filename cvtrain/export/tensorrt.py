"""Export to TensorRT, NVIDIA's runtime."""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from cvtrain.core.artifact import TENSORRT
from cvtrain.export.check import BATCH_SIZES
from cvtrain.export.graph import GraphExporter
from cvtrain.export.network import Prepared
from cvtrain.export.onnx import INPUT_NAME, write_onnx
from cvtrain.export.writing import ExportError, asking
from cvtrain.runtime import loader
from cvtrain.runtime.archive import METADATA

MAX_BATCH = 64
"""Most pictures that an engine takes at once."""


class TensorRT(GraphExporter):
    """Build the float32 engine for the GPU of this machine, which takes minutes; it runs on no other kind of GPU.

    A plan has no place for metadata, so that the file is an uncompressed zip archive of both: `unzip` gives the
    `model.plan` that other programs load.

    Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/python-api-docs.html
    """

    option, runtime, suffix, note = "tensorrt", TENSORRT, ".plan.zip", "for this machine's GPU only"

    def __init__(self) -> None:
        """See that TensorRT and a GPU are there.

        Raises:
            ConfigError: TensorRT is not installed, or PyTorch sees no GPU.
        """
        loader(TENSORRT)
        super().__init__()

    def _write(self, prepared: Prepared, path: Path) -> tuple[int, ...]:
        backend = loader(TENSORRT)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            source = Path(temporary) / "float.onnx"
            write_onnx(prepared, source)
            with asking("TensorRT cannot build this model"):
                plan = _build(backend, source, tuple(prepared.images.shape[1:]))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(METADATA, json.dumps(prepared.metadata))
            archive.writestr(backend.PLAN, plan)
        return BATCH_SIZES


def _build(backend: Any, source: Path, picture: tuple[int, ...]) -> bytes:  # noqa: ANN401 - a module of a lazy import
    """Return the engine of an ONNX file that takes 1 to `MAX_BATCH` pictures, and is fastest with one."""
    trt, logger = backend.trt, backend.make_logger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source)):
        found = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise ExportError(f"TensorRT cannot read this model ({'; '.join(found[:3])})")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: ten bits of mantissa where float32 has 23
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT_NAME, (1, *picture), (1, *picture), (MAX_BATCH, *picture))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT cannot build this model ({'; '.join(logger.errors[-3:])})")
    return bytes(plan)
