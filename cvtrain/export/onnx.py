"""Export to ONNX, checked and run before anyone else sees the file."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cvtrain.core.artifact import ONNXRUNTIME, Artifact
from cvtrain.core.complexity import count_macs, count_params
from cvtrain.core.files import storage_error, sync_folder, write_atomic
from cvtrain.core.quiet import quiet
from cvtrain.errors import ConfigError, CvtrainError

MIN_OPSET = 18
INPUT_NAME, OUTPUT_NAME = "images", "logits"
# One protobuf message cannot be larger.
_ONE_FILE_BYTES = 2_000_000_000
_TOLERANCE = 1e-4


class Onnx:
    """Write `model.onnx`, the float model for ONNX Runtime and everything else that reads ONNX."""

    def __init__(self, opset: int = 20, dynamic: bool = True) -> None:
        """Check the settings.

        Args:
            opset: Version of the operator set, 18 or more.
            dynamic: Take any batch size; otherwise a batch of 1.

        Raises:
            ConfigError: An opset the exporter cannot write.
        """
        _check_opset(opset)
        self.opset = opset
        self.dynamic = dynamic

    def export(self, model: nn.Module, example: Tensor, folder: Path, metadata: Mapping[str, str]) -> Artifact:
        """Export and check.

        Args:
            model: Any device and mode; never changed.
            example: `(1, C, H, W)` float32 normalised input.
            folder: Where `model.onnx` goes; exists.
            metadata: Text for the file's `metadata_props`.

        Returns:
            The file, already compared with `model`.

        Raises:
            CvtrainError: The model cannot be exported, or the file does not reproduce it.
            StorageError: The disk is full or read-only.
        """
        path = folder / "model.onnx"
        export_onnx(model, example, path, metadata, opset=self.opset, dynamic=self.dynamic)
        return Artifact("onnx", path, ONNXRUNTIME, count_params(model), count_macs(model, example))


def export_onnx(
    model: nn.Module,
    example: Tensor,
    path: Path,
    metadata: Mapping[str, str],
    *,
    opset: int = 20,
    dynamic: bool = True,
) -> None:
    """Write `model` to `path`, with input `images` and output `logits`; the file appears only once it is checked.

    Args:
        model: Any device and mode; never changed.
        example: `(1, C, H, W)` float32 normalised input.
        path: The `.onnx` file; weights above 2 GB go to a `.data` file beside it.
        metadata: Text for the file's `metadata_props`.
        opset: Version of the operator set, 18 or more.
        dynamic: Take any batch size; otherwise a batch of 1.

    Raises:
        ConfigError: An opset the exporter cannot write.
        CvtrainError: The model cannot be exported, or its logits in ONNX Runtime are off by more than 1e-4 of the
            largest logit (of 1 where all are smaller) at batch 1, 2 or 7.
        StorageError: The disk is full or read-only.
    """
    _check_opset(opset)
    plain = copy.deepcopy(model).cpu().eval().to(memory_format=torch.contiguous_format)
    images = example[:1].detach().cpu().float()
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx-") as temporary:
            # The final name, because a file with outside data stores the name of its data.
            work = Path(temporary) / path.name
            _write(plain, images, work, metadata, opset=opset, dynamic=dynamic)
            _check_file(work, opset)
            _compare(work, plain, images, batch_sizes=(1, 2, 7) if dynamic else (1,))
            for sidecar in sorted(set(work.parent.iterdir()) - {work}):
                sidecar.replace(path.with_name(sidecar.name))
            sync_folder(path.parent)
            write_atomic(path, work.read_bytes())
    except OSError as error:
        raise storage_error(path, error) from error


def _check_opset(opset: int) -> None:
    if opset < MIN_OPSET:
        raise ConfigError(
            f"export.onnx.opset={opset}: must be {MIN_OPSET} or more, PyTorch's exporter writes nothing older.\n"
            "Use export.onnx.opset=20"
        )


def _write(
    model: nn.Module, images: Tensor, path: Path, metadata: Mapping[str, str], *, opset: int, dynamic: bool
) -> None:
    # torch.export takes a size of 1 for a constant, so a free batch size has to be traced with two pictures.
    traced = torch.cat([images, images]) if dynamic else images
    shapes: Any = ({0: torch.export.Dim("batch")},) if dynamic else None
    try:
        with quiet():
            program = torch.onnx.export(
                model,
                (traced,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                dynamic_shapes=shapes,
                verbose=False,
            )
            if program is None:
                raise CvtrainError("the exporter returned nothing")
            _strip(program.model)
            program.model.metadata_props.update(metadata)
            program.save(str(path), external_data=_weight_bytes(model) >= _ONE_FILE_BYTES)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise CvtrainError(
            f"export.onnx: PyTorch cannot export this model ({_first_line(error)}).\n"
            "Leave onnx (and compression=ptq_static, which needs it) out, or choose another model."
        ) from error


def _strip(model: Any) -> None:  # noqa: ANN401 - onnx_ir.Model, a type of a lazy import
    """Remove the exporter's debugging notes.

    They carry the source lines and file paths of this machine into the deployed file, and are a third of the bytes of
    a small model.
    """
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _weight_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _check_file(path: Path, opset: int) -> None:
    import onnx

    try:
        # By path: the only way that follows outside data.
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise CvtrainError(f"export.onnx: the file is not valid ONNX ({_first_line(error)})") from error
    written = next(
        entry.version for entry in onnx.load(path, load_external_data=False).opset_import if not entry.domain
    )
    if written != opset:
        raise ConfigError(
            f"export.onnx.opset={opset}: the installed exporter can write this model in opset {written} only.\n"
            f"Use export.onnx.opset={written}"
        )


def _compare(path: Path, model: nn.Module, images: Tensor, batch_sizes: tuple[int, ...]) -> None:
    """Run the saved file beside the model, on noisy copies of the example: an all-zero one hides differences."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    generator = torch.Generator().manual_seed(0)
    session = None
    for size in batch_sizes:
        batch = images + torch.randn((size, *images.shape[1:]), generator=generator)
        with torch.no_grad():
            expected = model(batch).numpy()
        try:
            if session is None:
                session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            (logits,) = session.run([OUTPUT_NAME], {INPUT_NAME: batch.numpy()})
        except Exception as error:
            raise CvtrainError(
                f"export.onnx: the file does not run in ONNX Runtime at batch {size} ({_first_line(error)})"
            ) from error
        scale = max(1.0, float(np.abs(expected).max()))
        difference = float(np.abs(logits - expected).max()) / scale if logits.shape == expected.shape else float("inf")
        if not difference <= _TOLERANCE:
            raise CvtrainError(
                f"export.onnx: at batch {size} the file's logits differ from the model's by {difference:.2g} of the "
                f"largest; allowed is {_TOLERANCE:g}.\nLeave onnx out, or choose another model."
            )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
