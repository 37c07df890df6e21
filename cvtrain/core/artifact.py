"""What compression and export produce, and what the proof needs to judge it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

TORCH = "torch"
ONNXRUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Artifact:
    """A file that can be deployed.

    Attributes:
        name: Row name in artifacts.csv: `fp32`, `onnx`, `pruned`, `pruned+int8`.
        path: The file.
        runtime: `torch` (a .safetensors of weights) or `onnxruntime` (a .onnx file).
        params: Number of parameters.
        macs: Multiply-accumulates for one picture.
        model: The module to load the weights into, for the `torch` runtime.
        note: What a reader of the table should know: "50 % of the weights are zero".
    """

    name: str
    path: Path
    runtime: str
    params: int
    macs: int
    model: nn.Module | None = None
    note: str = ""


@dataclass(frozen=True)
class CompressionContext:
    """What a compression step may use besides the model itself.

    Attributes:
        folder: Where its files go; exists.
        example: `(1, C, H, W)` float32 normalised input, on the CPU.
        calibration: Returns batches of normalised float32 training pictures `(B, C, H, W)`, not augmented, on the CPU.
        finetune: `finetune(model, epochs)` trains `model` in place by the run's own recipe.
        save_weights: `save_weights(model, path)` writes a deployable .safetensors with its metadata.
        export_onnx: `export_onnx(model, path)` writes and checks a float ONNX file with a dynamic batch.
    """

    folder: Path
    example: Tensor
    calibration: Callable[[], Iterator[Tensor]]
    finetune: Callable[[nn.Module, int], None]
    save_weights: Callable[[nn.Module, Path], None]
    export_onnx: Callable[[nn.Module, Path], None]


@dataclass(frozen=True)
class Compressed:
    """Result of one compression step.

    Attributes:
        model: The model the next step works on; None when the step left PyTorch and nothing can follow.
        artifact: The file it wrote.
    """

    model: nn.Module | None
    artifact: Artifact


class CompressionStep(Protocol):
    """One step of the `compression` group; steps are applied in the order given, each to the one before's result."""

    label: str
    """Short name that joins the artifact's name: `pruned`, `int8`."""

    def apply(self, model: nn.Module, name: str, context: CompressionContext) -> Compressed:
        """Compress a copy of `model` (CPU, eval mode); `name` is the artifact's full name."""
        ...
