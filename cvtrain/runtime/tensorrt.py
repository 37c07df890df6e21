"""TensorRT on an NVIDIA GPU; importing this module imports TensorRT, and needs a GPU."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from cvtrain.core.extras import import_extra
from cvtrain.core.runtimes import TENSORRT
from cvtrain.errors import ConfigError, WeightsError
from cvtrain.runtime.archive import METADATA, in_parts, loading
from cvtrain.runtime.base import Loaded

PLAN = "model.plan"
"""Name of the engine in its archive."""


trt = import_extra("tensorrt", "export=tensorrt", "tensorrt")
if not torch.cuda.is_available():
    raise ConfigError(
        "export=tensorrt needs an NVIDIA GPU, and PyTorch sees none here (torch.cuda.is_available() is false).\n"
        "Run it where there is one, with a CUDA build of PyTorch, or leave out tensorrt."
    )


def make_logger() -> Any:  # noqa: ANN401 - a class without types
    """Return a TensorRT logger that prints nothing and keeps the errors in a list `errors`."""
    severe = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Keeper(trt.ILogger):  # type: ignore[misc,name-defined]
        """Keeps errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:  # noqa: ANN401 - an enum of the library
            if severity in severe:
                self.errors.append(msg)

    return Keeper()


def load(path: Path, threads: int) -> Loaded:
    """Load the engine of a `.plan.zip` file; batches larger than it takes are run in parts.

    Args:
        path: The file, built for this kind of GPU.
        threads: Without effect.

    Raises:
        WeightsError: The file is missing, damaged, or built for another GPU or another version.
    """
    logger = make_logger()
    with loading(path, TENSORRT):
        with zipfile.ZipFile(path) as archive:
            metadata: dict[str, str] = json.loads(archive.read(METADATA))
            engine = trt.Runtime(logger).deserialize_cuda_engine(archive.read(PLAN))
        if engine is None:
            reason = "; ".join(logger.errors[-3:])[:300]
            raise WeightsError(f"{TENSORRT} cannot load {path} ({reason}). Export it again, on this machine.")
        source, target = (engine.get_tensor_name(index) for index in range(engine.num_io_tensors))
        most = engine.get_tensor_profile_shape(source, 0)[2][0]
        context = engine.create_execution_context()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def forward(pixels: NDArray[Any]) -> NDArray[Any]:
        with torch.cuda.stream(stream):
            images = torch.from_numpy(pixels).cuda()
            if not context.set_input_shape(source, tuple(images.shape)):
                raise ValueError(f"{path} does not take an array {tuple(images.shape)}")
            answers = torch.empty(tuple(context.get_tensor_shape(target)), device=images.device)
            context.set_tensor_address(source, images.data_ptr())
            context.set_tensor_address(target, answers.data_ptr())
            if not context.execute_async_v3(stream.cuda_stream):
                raise RuntimeError("; ".join(logger.errors[-3:]))
            found: NDArray[Any] = answers.cpu().numpy()  # waits for the stream
        return found

    return Loaded(in_parts(forward, most), metadata, metadata.get("embedded") == "true")
