"""Post-training static quantization to INT8 by ONNX Runtime."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from cvtrain.compression.steps import artifact_file
from cvtrain.core.artifact import ONNXRUNTIME, Artifact, Compressed, CompressionContext
from cvtrain.core.complexity import count_macs, count_params
from cvtrain.core.files import write_atomic
from cvtrain.core.quiet import quiet
from cvtrain.errors import ConfigError, CvtrainError, DataError, did_you_mean

Method = Literal["minmax", "entropy", "percentile"]
_METHODS: tuple[Method, ...] = get_args(Method)
# Histogram calibration keeps every activation of a batch in memory: 16 pictures of 224 px through a ResNet-18 are
# about half a gigabyte.
_BATCH = 16
_CHECKED_BATCHES = (1, 7)


class PtqStatic:
    """Quantize weights and activations to 8 bits with ranges measured on training pictures.

    Affine 8-bit quantization as in Jacob et al., "Quantization and training of neural networks for efficient
    integer-arithmetic-only inference", CVPR 2018: unsigned activations, signed symmetric weights. ONNX Runtime has
    fast kernels for exactly this pair on CPUs with VNNI.
    """

    label = "int8"
    leaves_torch = True

    def __init__(
        self,
        calibration_samples: int = 512,
        method: Method = "minmax",
        per_channel: bool = True,
        reduce_range: bool = False,
    ) -> None:
        """Check the settings.

        Args:
            calibration_samples: Training pictures whose activations set the ranges, 1 or more.
            method: `minmax` covers every value seen; `entropy` and `percentile` cut outliers off.
            per_channel: One weight scale for each output channel instead of one a tensor.
            reduce_range: 7-bit weights, which cannot overflow on CPUs without VNNI.

        Raises:
            ConfigError: A value out of range.
        """
        where = "compression.ptq_static"
        if calibration_samples < 1:
            raise ConfigError(f"{where}.calibration_samples={calibration_samples}: must be 1 or more")
        if method not in _METHODS:
            raise ConfigError(f"{where}.method={method}: {did_you_mean(method, _METHODS)}")
        self.calibration_samples = calibration_samples
        self.method = method
        self.per_channel = per_channel
        self.reduce_range = reduce_range

    def apply(self, model: nn.Module, name: str, context: CompressionContext) -> Compressed:
        """Export `model`, calibrate it and write the INT8 file.

        Args:
            model: On the CPU; never changed.
            name: Name of the artifact.
            context: Uses `calibration`, `export_onnx`, `example` and `folder`.

        Returns:
            The `.onnx` file, which takes any batch size the float export takes. No model: nothing can follow.

        Raises:
            DataError: There is no calibration picture.
            CvtrainError: ONNX Runtime cannot quantize the model, or cannot run what it wrote.
        """
        batches = _calibration_batches(context.calibration(), self.calibration_samples)
        path = context.folder / artifact_file(name, ".onnx")
        with tempfile.TemporaryDirectory(dir=context.folder, prefix=".int8-") as temporary:
            # Absolute, because a part of the work runs in another current directory.
            work = Path(temporary).resolve()
            context.export_onnx(model, work / "float.onnx")
            method = self._quantize(work / "float.onnx", work / "int8.onnx", batches)
            _finish(work / "int8.onnx", work / "float.onnx")
            _check_runs(work / "int8.onnx", context.example)
            write_atomic(path, (work / "int8.onnx").read_bytes())
        note = f"static INT8, {method} ranges of {sum(len(batch) for batch in batches)} training pictures"
        if method != self.method:
            note += f"; {self.method} calibration failed on this model"
        artifact = Artifact(
            name=name,
            path=path,
            runtime=ONNXRUNTIME,
            params=count_params(model),
            macs=count_macs(model, context.example),
            note=note,
        )
        return Compressed(model=None, artifact=artifact)

    def _quantize(self, source: Path, target: Path, batches: list[NDArray[np.float32]]) -> str:
        """Write `target` and return the calibration method that worked."""
        prepared = source.with_name("prepared.onnx")
        try:
            with quiet():
                _prepare(source, prepared)
                try:
                    self._quantize_static(prepared, target, batches, self.method)
                    return self.method
                except ValueError as error:
                    # NumPy refuses a histogram whose bins are narrower than the float format resolves.
                    if self.method == "minmax" or "too many bins" not in str(error).lower():
                        raise
                    self._quantize_static(prepared, target, batches, "minmax")
                    return "minmax"
        except (OSError, MemoryError):
            raise
        except Exception as error:
            raise CvtrainError(
                f"compression.ptq_static: ONNX Runtime could not quantize this model ({_first_line(error)}).\n"
                "Leave ptq_static out of compression=[...], or choose another model."
            ) from error

    def _quantize_static(self, source: Path, target: Path, batches: list[NDArray[np.float32]], method: str) -> None:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        methods = {
            "minmax": CalibrationMethod.MinMax,
            "entropy": CalibrationMethod.Entropy,
            "percentile": CalibrationMethod.Percentile,
        }
        quantize_static(
            str(source),
            str(target),
            _make_reader("images", batches),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=self.per_channel,
            reduce_range=self.reduce_range,
            calibrate_method=methods[method],
            # One batch at a time, whatever the method: otherwise every activation of every picture is held at once.
            extra_options={"CalibStridedMinMax": 1},
        )


def _calibration_batches(batches: Iterable[Tensor], samples: int) -> list[NDArray[np.float32]]:
    """Return the first `samples` pictures as arrays `(<=16, C, H, W)` float32."""
    kept: list[NDArray[np.float32]] = []
    missing = samples
    for batch in batches:
        pictures = batch[:missing].detach().cpu().float().numpy()
        kept.extend(pictures[start : start + _BATCH] for start in range(0, len(pictures), _BATCH))
        missing -= len(pictures)
        if missing == 0:
            break
    if not kept:
        raise DataError("compression.ptq_static: there is no training picture to calibrate on")
    return kept


def _make_reader(input_name: str, batches: list[NDArray[np.float32]]) -> Any:  # noqa: ANN401 - a type of a lazy import
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Hands out calibration batches, all or a range of them."""

        def __init__(self) -> None:
            self._pending = iter(batches)

        def __len__(self) -> int:
            return len(batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self._pending = iter(batches[start_index:end_index])

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(self._pending, None)
            return None if batch is None else {input_name: batch}

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


def _finish(path: Path, source: Path) -> None:
    """Give the INT8 file the metadata of its float source."""
    import onnx

    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in onnx.load(source, load_external_data=False).metadata_props}
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


def _check_runs(path: Path, example: Tensor) -> None:
    """Run the saved file at several batch sizes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        source = session.get_inputs()[0]
        sizes = (source.shape[0],) if isinstance(source.shape[0], int) else _CHECKED_BATCHES
        for size in sizes:
            images = np.repeat(example[:1].numpy(), size, axis=0)
            (logits,) = session.run(None, {source.name: images})
            if len(logits) != size or not np.isfinite(logits).all():
                raise CvtrainError(f"gives {logits.shape} for a batch of {size}, or values that are not finite")
    except Exception as error:
        raise CvtrainError(
            f"compression.ptq_static: the INT8 file does not run in ONNX Runtime ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
