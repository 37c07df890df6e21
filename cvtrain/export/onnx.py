"""Export to ONNX, checked and run before anyone else sees the file."""

from __future__ import annotations

import importlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvtrain.core.artifact import ONNXRUNTIME, Artifact
from cvtrain.core.complexity import count_macs, count_params
from cvtrain.errors import ConfigError
from cvtrain.export.base import Exporter
from cvtrain.export.check import BATCH_SIZES, compare
from cvtrain.export.network import Prepared, prepare
from cvtrain.export.writing import ExportError, asking, first_line, reporting, writing

log = logging.getLogger("cvtrain")

MIN_OPSET = 18
OLDER, OLDER_MAX_OPSET = "dynamo=False", 20
"""PyTorch's older exporter, by way of TorchScript, and the newest opset that it knows; no longer developed."""
INPUT_NAME = "images"
# One protobuf message cannot be larger.
_ONE_FILE_BYTES = 2_000_000_000


class Onnx(Exporter):
    """Write the float model for ONNX Runtime and everything else that reads ONNX."""

    def __init__(self, opset: int = 20, dynamic: bool = True, embed_preprocessing: bool = False) -> None:
        """Check the settings.

        Args:
            opset: Version of the operator set, 18 or more.
            dynamic: Take any batch size; otherwise a batch of 1.
            embed_preprocessing: Take uint8 pictures as they are read and give probabilities.

        Raises:
            ConfigError: An opset the exporter cannot write.
        """
        _check_opset(opset)
        self.opset = opset
        self.dynamic = dynamic
        self.embed_preprocessing = embed_preprocessing

    def export(
        self, model: nn.Module, example: Tensor, folder: Path, metadata: Mapping[str, str], name: str = "model"
    ) -> Artifact:
        """Export and check.

        Args:
            model: Any device and mode; never changed.
            example: `(1, C, H, W)` float32 normalised input.
            folder: Where `name.onnx` goes; exists.
            metadata: Text for the file's `metadata_props`.
            name: The file's, without its suffix.

        Returns:
            The file, already compared with `model`.

        Raises:
            ConfigError: The installed exporter cannot write this model in the opset asked for.
            CvtrainError: The model cannot be exported, or the file does not reproduce it.
            StorageError: The disk is full or read-only.
        """
        return self._export(model, example, folder / f"{name}.onnx", metadata, tuple(_EXPORTERS))

    def retry(
        self, model: nn.Module, example: Tensor, folder: Path, metadata: Mapping[str, str], name: str = "model"
    ) -> Artifact:
        """Do as `export`, with PyTorch's older exporter alone."""
        return self._export(model, example, folder / f"{name}.onnx", metadata, (OLDER,))

    def _export(
        self, model: nn.Module, example: Tensor, path: Path, metadata: Mapping[str, str], exporters: Sequence[str]
    ) -> Artifact:
        prepared = prepare(model, example, metadata, self.embed_preprocessing)
        with reporting("onnx"):
            used = write_onnx(prepared, path, opset=self.opset, dynamic=self.dynamic, exporters=exporters)
        note = f"written by PyTorch's older exporter ({used})" if used == OLDER else ""
        return Artifact("onnx", path, ONNXRUNTIME, count_params(model), count_macs(model, example), note=note)


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
        CvtrainError: The model cannot be exported, or the file does not reproduce it.
        StorageError: The disk is full or read-only.
    """
    with reporting("onnx"):
        write_onnx(prepare(model, example, metadata), path, opset=opset, dynamic=dynamic)


def write_onnx(
    prepared: Prepared,
    path: Path,
    *,
    opset: int = 20,
    dynamic: bool = True,
    exporters: Sequence[str] | None = None,
) -> str:
    """Write a network with the first of PyTorch's exporters whose file is valid and gives the network's answers.

    Args:
        prepared: The network.
        path: The `.onnx` file; weights above 2 GB go to a `.data` file beside it.
        opset: Version of the operator set, 18 or more.
        dynamic: Take any batch size; otherwise a batch of 1.
        exporters: Which to try, in order; None: all.

    Returns:
        Name of the exporter that wrote the file.

    Raises:
        ConfigError: An opset the exporter cannot write.
        ExportError: What is wrong with each exporter's file.
        StorageError: The disk is full or read-only.
    """
    _check_opset(opset)
    reasons: dict[str, ExportError] = {}
    for exporter in exporters or _EXPORTERS:
        if reasons:
            log.warning("onnx: %s; trying PyTorch's older exporter (%s)", *reasons.values(), exporter)
        try:
            with writing(path) as work:
                _EXPORTERS[exporter](prepared, work, opset, dynamic)
                _check_file(work, opset)
                compare(prepared, work, ONNXRUNTIME, BATCH_SIZES if dynamic else (1,))
            return exporter
        except ExportError as error:
            reasons[exporter] = error
    raise ExportError("\n  and ".join(f"with {exporter} {reason}" for exporter, reason in reasons.items()))


def _check_opset(opset: int) -> None:
    if opset < MIN_OPSET:
        raise ConfigError(
            f"export.onnx.opset={opset}: must be {MIN_OPSET} or more, PyTorch's exporter writes nothing older.\n"
            "Use export.onnx.opset=20"
        )


def _by_dynamo(prepared: Prepared, path: Path, opset: int, dynamic: bool) -> None:
    shapes: Any = ({0: torch.export.Dim("batch")},) if dynamic else None
    with asking("PyTorch cannot export this model"), _operators_read_once():
        program = torch.onnx.export(
            prepared.network,
            (prepared.pair if dynamic else prepared.images,),
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT_NAME],
            output_names=[prepared.answer],
            dynamic_shapes=shapes,
            verbose=False,
        )
        if program is None:
            raise ExportError("the exporter returned nothing")
        _strip(program.model)
        program.model.metadata_props.update(prepared.metadata)
        program.save(str(path), external_data=_is_large(prepared.network))


@contextmanager
def _operators_read_once() -> Iterator[None]:
    """Spare PyTorch reading the sources of its 500 ONNX operators at each export, most of the time of a small one's."""
    try:
        registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
        read = registry.from_torchlib
    except (ImportError, AttributeError):  # internals, which may move
        yield
        return

    def remembered(opset_version: int) -> Any:  # noqa: ANN401 - a type of PyTorch's internals
        if opset_version not in _operators:
            _operators[opset_version] = read(opset_version)
        return _operators[opset_version]

    registry.from_torchlib = staticmethod(remembered)
    try:
        yield
    finally:
        registry.from_torchlib = read


_operators: dict[int, Any] = {}
"""PyTorch's ONNX operators by opset."""


def _by_torchscript(prepared: Prepared, path: Path, opset: int, dynamic: bool) -> None:
    import onnx

    if opset > OLDER_MAX_OPSET:
        raise ExportError(f"opset {opset} is not possible, only up to {OLDER_MAX_OPSET}")
    axes = {name: {0: "batch"} for name in (INPUT_NAME, prepared.answer)}
    with asking("PyTorch cannot export this model"), tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        # Beside a large one it leaves a file for each tensor.
        raw = Path(temporary) / path.name
        torch.onnx.export(
            prepared.network,
            (prepared.pair if dynamic else prepared.images,),
            str(raw),
            dynamo=False,
            opset_version=opset,
            input_names=[INPUT_NAME],
            output_names=[prepared.answer],
            dynamic_axes=axes if dynamic else None,
        )
        model = onnx.load(raw)
        onnx.helper.set_model_props(model, prepared.metadata)
        onnx.save(model, path, save_as_external_data=_is_large(prepared.network), location=f"{path.name}.data")


_EXPORTERS: dict[str, Callable[[Prepared, Path, int, bool], None]] = {
    "dynamo=True": _by_dynamo,
    OLDER: _by_torchscript,
}
"""PyTorch's exporters by the argument of `torch.onnx.export` that chooses them, the better one first."""


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


def _is_large(model: nn.Module) -> bool:
    size: int = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return size >= _ONE_FILE_BYTES


def _check_file(path: Path, opset: int) -> None:
    import onnx

    try:
        # By path: the only way that follows outside data.
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"the file is not valid ONNX ({first_line(error)})") from error
    written = next(
        entry.version for entry in onnx.load(path, load_external_data=False).opset_import if not entry.domain
    )
    if written != opset:
        raise ConfigError(
            f"export.onnx.opset={opset}: the installed exporter can write this model in opset {written} only.\n"
            f"Use export.onnx.opset={written}"
        )
