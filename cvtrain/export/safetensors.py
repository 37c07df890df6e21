"""Export to plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from cvtrain.core.artifact import TORCH, Artifact
from cvtrain.core.complexity import count_macs, count_params
from cvtrain.core.weights import save_weights
from cvtrain.export.base import Exporter


class Safetensors(Exporter):
    """Write the weights without pickle, with class names and preprocessing in the header."""

    def export(
        self, model: nn.Module, example: Tensor, folder: Path, metadata: Mapping[str, str], name: str = "model"
    ) -> Artifact:
        """Write `name.safetensors`; tensors that share memory are written once each, so loading needs no care.

        Args:
            model: Any device, mode and memory format; never changed.
            example: `(1, C, H, W)` float32 normalised input, to count the multiply-accumulates.
            folder: Where the file goes; exists.
            metadata: Text for the file's header.
            name: The file's, without its suffix.

        Returns:
            The file; its metadata say which network to load it into.

        Raises:
            StorageError: The disk is full or read-only.
        """
        path = folder / f"{name}.safetensors"
        save_weights(model, path, dict(metadata))
        return Artifact("safetensors", path, TORCH, count_params(model), count_macs(model, example))
