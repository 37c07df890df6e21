"""What compression and export produce, and what the proof needs to judge it; torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cvtrain.core.runtimes import ONNXRUNTIME, OPENVINO, TENSORRT, TORCH, TORCH_EXPORT, TORCHSCRIPT

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "ONNXRUNTIME",
    "OPENVINO",
    "TENSORRT",
    "TORCH",
    "TORCHSCRIPT",
    "TORCH_EXPORT",
    "Artifact",
    "Compressed",
    "CompressionContext",
    "CompressionStep",
    "TradeOff",
]


@dataclass(frozen=True)
class Artifact:
    """A file that can be deployed; it says itself how to rebuild and feed the model.

    Attributes:
        name: Row name in artifacts.csv: `fp32`, `onnx`, `pruned`, `pruned+int8`.
        path: The file.
        runtime: One of `core.runtimes.RUNTIMES`.
        params: Number of parameters.
        macs: Multiply-accumulates for one picture.
        exact: Whether it must give the float model's own answers; False for what compression has changed.
        note: What a reader of the table should know: "50 % of the weights are zero".
    """

    name: str
    path: Path
    runtime: str
    params: int
    macs: int
    exact: bool = True
    note: str = ""


@dataclass(frozen=True)
class CompressionContext:
    """What a compression step may use besides the model itself.

    Attributes:
        folder: Where its files go; exists.
        example: `(1, C, H, W)` float32 normalised input, on the CPU.
        calibration: Returns batches of normalised float32 training pictures `(B, C, H, W)`, not augmented, on the CPU.
        finetune: `finetune(model, epochs, lr, teacher)` trains `model` in place by the run's own recipe (augmentation,
            losses, averaging) from a share `lr` of the run's learning rate; where `teacher` is not None its answers are
            distilled. The model is on the CPU and in eval mode before and after. 0 epochs do nothing.
        evaluate: `evaluate(model)` returns the share of right answers on the validation set, 0..1.
        backward: `backward(model, batches)` adds the gradients of the run's loss over so many training batches to the
            `.grad` of the model's parameters.
        save_weights: `save_weights(model, path, metadata)` writes a deployable .safetensors: the run's metadata and
            the given ones.
        export_onnx: `export_onnx(model, path)` writes and checks a float ONNX file with a dynamic batch.
    """

    folder: Path
    example: Tensor
    calibration: Callable[[], Iterator[Tensor]]
    finetune: Callable[[nn.Module, int, float, nn.Module | None], None]
    evaluate: Callable[[nn.Module], float]
    backward: Callable[[nn.Module, int], None]
    save_weights: Callable[[nn.Module, Path, Mapping[str, str]], None]
    export_onnx: Callable[[nn.Module, Path], None]


@dataclass(frozen=True)
class TradeOff:
    """One point of the curve of a compression in stages.

    Attributes:
        amount: Share of the weights or channels taken away, 0..1; 0 is the model before.
        params: Parameters left; of masked weights those that are not zero.
        macs: Multiply-accumulates left for one picture.
        accuracy: Share of right answers on the validation set behind the stage's fine-tuning, 0..1.
        artifact: Name of the stage's artifact; empty for the model before.
    """

    amount: float
    params: int
    macs: int
    accuracy: float
    artifact: str = ""


@dataclass(frozen=True)
class Compressed:
    """Result of one compression step.

    Attributes:
        artifacts: The files it wrote, the one that counts last.
        model: The model the next step works on; None when the next step works on the one that this step was given, as
            behind a quantization, whose file is a side product.
        smaller: Whether `model` has become another network, worth an export of its own.
        tradeoff: Of a compression in stages, from the model before to the last stage.
        layers: What was done to each layer, one row each with the same keys; written as CSV.
    """

    artifacts: tuple[Artifact, ...]
    model: nn.Module | None = None
    smaller: bool = False
    tradeoff: tuple[TradeOff, ...] = ()
    layers: tuple[dict[str, Any], ...] = field(default=())


class CompressionStep(Protocol):
    """One step of the `compression` group; steps are applied in the order given, each to the one before's result."""

    label: str
    """Short name that joins the artifact's name: `pruned`, `int8`."""

    def apply(self, model: nn.Module, name: str, context: CompressionContext) -> Compressed:
        """Compress a copy of `model` (CPU, eval mode); `name` is the artifact's full name."""
        ...
