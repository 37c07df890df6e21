"""What the quantizations to INT8 by ONNX Runtime share."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cvtrain.compression.quantize_report import QuantizedLayer, quantizable, quantized_layers
from cvtrain.core.artifact import ONNXRUNTIME, Artifact, CompressionContext
from cvtrain.core.complexity import count_macs, count_params
from cvtrain.core.files import write_atomic
from cvtrain.core.quiet import quiet
from cvtrain.errors import ConfigError, CvtrainError, DataError, did_you_mean

Method = Literal["minmax", "entropy", "percentile"]
_METHODS: tuple[Method, ...] = get_args(Method)
# Histogram calibration holds every activation of a batch: of 16 pictures of 224 px through a ResNet-18 half a gigabyte.
_BATCH, _BATCH_PIXELS = 16, 16 * 224 * 224
_CHECKED_BATCHES = (1, 7)
# Pictures that each layer's error is measured on: one has thousands of activations, and takes seconds through a VGG.
_REPORTED = 8


@dataclass(frozen=True)
class StaticSettings:
    """How weights and activations become 8-bit numbers.

    Attributes:
        where: Key of the step, for errors: `compression.ptq_static`.
        calibration_samples: Training pictures whose activations set the ranges, 1 or more.
        method: `minmax` covers every value seen; `entropy` and `percentile` cut outliers off.
        per_channel: One weight scale for each output channel instead of one a tensor.
        reduce_range: 7-bit weights, which cannot overflow on CPUs without VNNI.

    Raises:
        ConfigError: A value out of range.
    """

    where: str
    calibration_samples: int
    method: Method
    per_channel: bool
    reduce_range: bool

    def __post_init__(self) -> None:
        if self.calibration_samples < 1:
            raise ConfigError(f"{self.where}.calibration_samples={self.calibration_samples}: must be 1 or more")
        if self.method not in _METHODS:
            raise ConfigError(f"{self.where}.method={self.method}: {did_you_mean(self.method, _METHODS)}")


class StaticQuantizer:
    """A network, exported and calibrated once, to be quantized as often as needed.

    Affine 8-bit quantization as in Jacob et al., "Quantization and training of neural networks for efficient
    integer-arithmetic-only inference", CVPR 2018: unsigned activations, signed symmetric weights. ONNX Runtime has
    fast kernels for exactly this pair on CPUs with VNNI.

    Args:
        settings: What the step was told.
        model: On the CPU; never changed.
        context: Of the step; uses `export_onnx` and `calibration`.
        work: Folder for files in between; exists, and is removed by the caller.

    Raises:
        DataError: There is no calibration picture.
        CvtrainError: The model cannot be exported, or ONNX Runtime cannot calibrate it.
    """

    def __init__(self, settings: StaticSettings, model: nn.Module, context: CompressionContext, work: Path) -> None:
        self.settings = settings
        self._example = context.example
        self._source = work / "float.onnx"
        self._prepared = work / "prepared.onnx"  # constants folded, batch norm in the weights before it
        context.export_onnx(model, self._source)
        with in_words(settings.where):
            _prepare(self._source, self._prepared)
        batches = calibration_batches(context.calibration(), settings.calibration_samples)
        first = next(batches, None)
        if first is None:
            raise DataError(f"{settings.where}: there is no training picture to calibrate on")
        self._pictures = first[:_REPORTED]
        self._samples = 0
        self._method = settings.method  # in the end the one that worked
        self._ranges = self._calibrate(itertools.chain([first], batches), work)
        if self._ranges is None:
            self._method = "minmax"
            self._ranges = self._calibrate(
                calibration_batches(context.calibration(), settings.calibration_samples), work
            )

    def quantize(self, target: Path, keep_float: Collection[str] = ()) -> None:
        """Write the INT8 file with the float export's metadata; see that it runs at several batch sizes.

        Args:
            target: The `.onnx` file.
            keep_float: Names of the nodes that are not quantized.

        Raises:
            CvtrainError: ONNX Runtime cannot quantize the model, or cannot run what it wrote.
        """
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

        with in_words(self.settings.where):
            quantizer = QDQQuantizer(
                load_model_with_shape_infer(self._prepared),
                self.settings.per_channel,
                self.settings.reduce_range,
                QuantType.QInt8,
                QuantType.QUInt8,
                copy.deepcopy(self._ranges),  # the quantizer narrows those before a ReLU
                [],
                list(keep_float),
                quantizable(),
                {},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()  # the standard's order; it has put the new nodes at the end
            save_as(quantizer.model.model, target, self._source)
        check_runs(self.settings.where, target, self._example)

    def layers(self, int8: Path) -> list[QuantizedLayer]:
        """Return what quantization does to each layer, measured on the first calibration pictures.

        Args:
            int8: What `quantize` wrote without anything kept in float.

        Raises:
            CvtrainError: The layers cannot be run one by one.
        """
        with in_words(self.settings.where):
            return quantized_layers(self._prepared, int8, self._pictures)

    def note(self) -> str:
        """Return in words how the ranges came about."""
        failed = f"; {self.settings.method} calibration failed on this model"
        return f"{self._method} ranges of {self._samples} training pictures" + (
            "" if self._method == self.settings.method else failed
        )

    def _calibrate(self, batches: Iterable[NDArray[np.float32]], work: Path) -> Any:  # noqa: ANN401 - lazy import
        """Return the ranges of all activations; None where the values do not fit into a histogram."""
        from onnxruntime.quantization import CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        methods = {
            "minmax": CalibrationMethod.MinMax,
            "entropy": CalibrationMethod.Entropy,
            "percentile": CalibrationMethod.Percentile,
        }
        self._samples = 0
        with in_words(self.settings.where):
            calibrator = create_calibrator(
                self._prepared,
                quantizable(),
                augmented_model_path=str(work / "calibrated.onnx"),
                calibrate_method=methods[self._method],
            )
            try:
                (source,) = calibrator.infer_session.get_inputs()
                for batch in batches:
                    # One batch at a time, whatever the method: otherwise the activations of all pictures are held.
                    calibrator.collect_data(_make_reader(source.name, batch))
                    self._samples += len(batch)
                return calibrator.compute_data()
            except (ValueError, MemoryError) as error:
                # NumPy refuses a histogram whose bins are narrower than the float format resolves; one that starts
                # with a batch of almost nothing grows to more bins than there is memory for.
                crowded = isinstance(error, MemoryError) or "too many bins" in str(error).lower()
                if self._method == "minmax" or not crowded:
                    raise
                return None


def write_artifact(
    name: str, path: Path, quantized: Path, model: nn.Module, context: CompressionContext, note: str
) -> Artifact:
    """Put the finished INT8 file in its place.

    Raises:
        StorageError: The disk is full or read-only.
    """
    write_atomic(path, quantized.read_bytes())
    return Artifact(
        name=name,
        path=path,
        runtime=ONNXRUNTIME,
        params=count_params(model),
        macs=count_macs(model, context.example),
        exact=False,
        note=note,
    )


class OnnxModule(nn.Module):
    """Runs an ONNX file as if it were a network of PyTorch; it can neither be trained nor copied.

    Args:
        path: A file with one input and one output.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._session = open_session(path)
        self._input = self._session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        """Return the file's answers, float32 on the device of `images`, for `(B, C, H, W)` float ones."""
        fed = images.detach().to("cpu", torch.float32).contiguous().numpy()
        (answers,) = self._session.run(None, {self._input: fed})
        return torch.from_numpy(answers).to(images.device)


def open_session(path: Path) -> Any:  # noqa: ANN401 - a type of a lazy import
    """Return a silent session on the CPU with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check_runs(where: str, path: Path, example: Tensor) -> None:
    """Run a saved file at several batch sizes.

    Args:
        where: Key of the step, for errors.
        path: The `.onnx` file.
        example: `(1, C, H, W)` float32.

    Raises:
        CvtrainError: It does not run, or gives values that are not finite.
    """
    try:
        session = open_session(path)
        source = session.get_inputs()[0]
        sizes = (source.shape[0],) if isinstance(source.shape[0], int) else _CHECKED_BATCHES
        for size in sizes:
            images = np.repeat(example[:1].numpy(), size, axis=0)
            (logits,) = session.run(None, {source.name: images})
            if len(logits) != size or not np.isfinite(logits).all():
                raise ValueError(f"gives {logits.shape} for a batch of {size}, or values that are not finite")
    except Exception as error:
        raise CvtrainError(f"{where}: the INT8 file does not run in ONNX Runtime ({first_line(error)})") from error


@contextlib.contextmanager
def in_words(where: str) -> Iterator[None]:
    """Keep ONNX Runtime's tools silent, and say in words what they cannot do.

    Raises:
        CvtrainError: In place of whatever they raise, except where disk or memory is at fault.
    """
    try:
        with quiet():
            yield
    except (OSError, MemoryError, CvtrainError):
        raise
    except Exception as error:
        raise CvtrainError(
            f"{where}: ONNX Runtime could not quantize this model ({first_line(error)}).\n"
            f"Leave {where.rpartition('.')[2]} out of compression=[...], or choose another model."
        ) from error


def counted(number: int, noun: str) -> str:
    """Return `1 epoch`, `2 epochs`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, at most 300 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def save_as(model: Any, target: Path, source: Path) -> None:  # noqa: ANN401 - onnx.ModelProto of a lazy import
    """Write a quantized model with the metadata of the float file that it was made of."""
    import onnx

    properties = onnx.load(source, load_external_data=False).metadata_props
    onnx.helper.set_model_props(model, {entry.key: entry.value for entry in properties})
    onnx.save(model, target)


def calibration_batches(batches: Iterable[Tensor], samples: int) -> Iterator[NDArray[np.float32]]:
    """Yield the first `samples` pictures in arrays `(<=16, C, H, W)` float32, fewer of large ones."""
    missing = samples
    for batch in batches:
        pictures = batch[:missing].detach().cpu().float().numpy()
        size = max(1, min(_BATCH, _BATCH_PIXELS // (pictures.shape[-1] * pictures.shape[-2])))
        for start in range(0, len(pictures), size):
            yield pictures[start : start + size]
        missing -= len(pictures)
        if missing == 0:
            return


def _make_reader(name: str, batch: NDArray[np.float32]) -> Any:  # noqa: ANN401 - a type of a lazy import
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Hands out one batch."""

        def __init__(self) -> None:
            self._pending = iter([{name: batch}])

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return next(self._pending, None)

    return Reader()


def _prepare(source: Path, target: Path) -> None:
    """Fold constants and infer shapes, without the symbolic pass where it fails."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        # A failing symbolic pass drops a dump into the current directory: let that be the temporary one.
        with contextlib.chdir(source.parent):
            quant_pre_process(str(source), str(target))
    except Exception:
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
