"""Quantization-aware training."""

from __future__ import annotations

import copy
import tempfile
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from cvtrain.compression.fake_quant import RoundedInput, attach, plain_state
from cvtrain.compression.quantize import Method, StaticQuantizer, StaticSettings, counted, write_artifact
from cvtrain.compression.steps import artifact_file, check_finetuning
from cvtrain.core.artifact import Compressed, CompressionContext

# Training moves the ranges on; these batches only give it somewhere to start.
_FIRST_BATCHES = 4


class Qat:
    """Train on with weights and activations rounded to 8 bits, then quantize as `PtqStatic` does.

    Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
    CVPR 2018; Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: a whitepaper", 2018.
    Rounding one channel of a weight before or after batch norm is scaled into it comes to the same, since each channel
    has a scale of its own; so nothing has to be folded for training.
    """

    label = "qat"

    def __init__(
        self,
        finetune_epochs: int = 2,
        finetune_lr: float = 0.1,
        calibration_samples: int = 512,
        method: Method = "minmax",
        reduce_range: bool = False,
    ) -> None:
        """Check the settings.

        Args:
            finetune_epochs: Epochs of training with rounding; 0 gives what `PtqStatic` gives.
            finetune_lr: Share of the run's learning rate that this training begins at, above 0.
            calibration_samples: Training pictures whose activations set the file's ranges, 1 or more.
            method: `minmax` covers every value seen; `entropy` and `percentile` cut outliers off.
            reduce_range: 7-bit weights, which cannot overflow on CPUs without VNNI.

        Raises:
            ConfigError: A value out of range.
        """
        where = "compression.qat"
        check_finetuning(where, finetune_epochs, finetune_lr)
        self.finetune_epochs = finetune_epochs
        self.finetune_lr = finetune_lr
        self.settings = StaticSettings(where, calibration_samples, method, per_channel=True, reduce_range=reduce_range)

    def apply(self, model: nn.Module, name: str, context: CompressionContext) -> Compressed:
        """Train a copy of `model` for rounding and write the INT8 file.

        Args:
            model: On the CPU; never changed.
            name: Name of the artifact.
            context: Uses `finetune`, `calibration`, `export_onnx`, `example` and `folder`.

        Returns:
            The `.onnx` file and a row for each layer. No model: the next step works on the one given.

        Raises:
            DataError: There is no calibration picture.
            CvtrainError: ONNX Runtime cannot quantize the model, or cannot run what it wrote.
        """
        trained = self.train(model, context)
        path = context.folder / artifact_file(name, ".onnx")
        with tempfile.TemporaryDirectory(dir=context.folder, prefix=".qat.tmp-") as temporary:
            work = Path(temporary).resolve()
            quantizer = StaticQuantizer(self.settings, trained, context, work)
            quantizer.quantize(work / "int8.onnx")
            layers = quantizer.layers(work / "int8.onnx")
            note = f"static INT8 behind {counted(self.finetune_epochs, 'epoch')} of training for it, {quantizer.note()}"
            artifact = write_artifact(name, path, work / "int8.onnx", trained, context, note)
        return Compressed((artifact,), layers=tuple(layer.row() for layer in layers))

    def train(self, model: nn.Module, context: CompressionContext) -> nn.Module:
        """Return a copy of `model`, on the CPU in eval mode, whose weights have been trained for rounding."""
        trained = copy.deepcopy(model).eval()
        if not self.finetune_epochs:
            return trained
        rounding = copy.deepcopy(trained)
        attach(rounding, largest=64 if self.settings.reduce_range else 127)
        _find_ranges(rounding, context)
        context.finetune(rounding, self.finetune_epochs, self.finetune_lr, None)
        # Into the copy that was never attached: taking parametrizations off changes the order of the parameters.
        trained.load_state_dict(plain_state(rounding))
        return trained


def _find_ranges(model: nn.Module, context: CompressionContext) -> None:
    """Set the ranges of the inputs from a few training pictures; all but them stays as in evaluation."""
    ranges = [module for module in model.modules() if isinstance(module, RoundedInput)]
    for module in ranges:
        module.train()
    with torch.no_grad():
        for pictures in islice(context.calibration(), _FIRST_BATCHES):
            model(pictures)
    for module in ranges:
        module.eval()
