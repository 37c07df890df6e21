"""Post-training static quantization to INT8 by ONNX Runtime."""

from __future__ import annotations

import tempfile
from operator import attrgetter
from pathlib import Path

from torch import nn

from cvtrain.compression.quantize import Method, OnnxModule, StaticQuantizer, StaticSettings, write_artifact
from cvtrain.compression.quantize_report import QuantizedLayer
from cvtrain.compression.steps import artifact_file
from cvtrain.core.artifact import Compressed, CompressionContext
from cvtrain.errors import ConfigError


class PtqStatic:
    """Quantize weights and activations to 8 bits with ranges measured on training pictures."""

    label = "int8"

    def __init__(
        self,
        calibration_samples: int = 512,
        method: Method = "minmax",
        per_channel: bool = True,
        reduce_range: bool = False,
        auto_skip: bool = False,
        max_drop: float = 0.005,
    ) -> None:
        """Check the settings.

        Args:
            calibration_samples: Training pictures whose activations set the ranges, 1 or more.
            method: `minmax` covers every value seen; `entropy` and `percentile` cut outliers off.
            per_channel: One weight scale for each output channel instead of one a tensor.
            reduce_range: 7-bit weights, which cannot overflow on CPUs without VNNI.
            auto_skip: Leave the layers with the largest errors in float, as many as it takes and at most half of all.
            max_drop: Accuracy on the validation set that INT8 may cost with `auto_skip`, 0..1.

        Raises:
            ConfigError: A value out of range.
        """
        where = "compression.ptq_static"
        self.settings = StaticSettings(where, calibration_samples, method, per_channel, reduce_range)
        if max_drop is None or not 0.0 <= max_drop <= 1.0:  # where the same key stands elsewhere, null is allowed
            raise ConfigError(f"{where}.max_drop={max_drop}: must be a share of the answers, 0 to 1, such as 0.005")
        self.auto_skip = auto_skip
        self.max_drop = max_drop

    def apply(self, model: nn.Module, name: str, context: CompressionContext) -> Compressed:
        """Export `model`, calibrate it and write the INT8 file.

        Args:
            model: On the CPU; never changed.
            name: Name of the artifact.
            context: Uses `calibration`, `export_onnx`, `example` and `folder`; with `auto_skip` `evaluate`.

        Returns:
            The `.onnx` file, which takes any batch size the float export takes, and a row for each layer. No model:
            the next step works on the float one.

        Raises:
            DataError: There is no calibration picture.
            CvtrainError: ONNX Runtime cannot quantize the model, or cannot run what it wrote.
        """
        path = context.folder / artifact_file(name, ".onnx")
        with tempfile.TemporaryDirectory(dir=context.folder, prefix=".int8.tmp-") as temporary:
            # Absolute, because a part of the work runs in another current directory.
            work = Path(temporary).resolve()
            quantizer = StaticQuantizer(self.settings, model, context, work)
            quantizer.quantize(work / "int8.onnx")
            layers = quantizer.layers(work / "int8.onnx")
            kept: list[QuantizedLayer] = []
            note = f"static INT8, {quantizer.note()}"
            if self.auto_skip:
                kept, found = self._skip(quantizer, layers, model, context, work / "int8.onnx")
                note += found
            artifact = write_artifact(name, path, work / "int8.onnx", model, context, note)
        return Compressed((artifact,), layers=tuple(layer.row(int8=layer not in kept) for layer in layers))

    def _skip(
        self,
        quantizer: StaticQuantizer,
        layers: list[QuantizedLayer],
        model: nn.Module,
        context: CompressionContext,
        path: Path,
    ) -> tuple[list[QuantizedLayer], str]:
        """Leave more and more layers of `path` in float; return them, worst first, and what the note says of it."""
        worst_first = sorted(layers, key=attrgetter("output_snr_db"))
        accuracy = context.evaluate(model)
        count = 0
        while True:
            drop = accuracy - context.evaluate(OnnxModule(path))
            if drop <= self.max_drop or count == len(layers) // 2:
                break
            # 1, 2, 4, ...: each try is a pass over the validation set.
            count = min(max(1, 2 * count), len(layers) // 2)
            quantizer.quantize(path, [layer.node for layer in worst_first[:count]])
        kept = worst_first[:count]
        names = ", ".join(layer.layer for layer in kept)
        note = f"; {count} of {len(layers)} layers left in float{f' ({names})' if kept else ''}"
        note += f", accuracy on val {0.0 - 100 * drop:+.2f} points"
        return kept, note if drop <= self.max_drop else f"{note}, more than max_drop={self.max_drop:g} allows"
