"""Export to TorchScript, for LibTorch and programs that know no other format of PyTorch's."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cvtrain.core.artifact import TORCHSCRIPT, Artifact
from cvtrain.core.complexity import count_macs, count_params
from cvtrain.export.base import Exporter
from cvtrain.export.check import compare
from cvtrain.export.network import prepare
from cvtrain.export.writing import asking, reporting, writing
from cvtrain.runtime.archive import METADATA

log = logging.getLogger("cvtrain")


class TorchScript(Exporter):
    """Write the traced and frozen graph.

    The format holds a pickle by nature: the module's attributes are one, of tensors and plain values, which
    `torch.jit.load` reads with an interpreter of its own and not with Python's. Its code runs all the same: load only
    files you trust. PyTorch calls TorchScript deprecated; `torch_export` is its successor.
    """

    def __init__(self, embed_preprocessing: bool = False) -> None:
        """Keep the settings.

        Args:
            embed_preprocessing: Take uint8 pictures as they are read and give probabilities.
        """
        self.embed_preprocessing = embed_preprocessing

    def export(
        self, model: nn.Module, example: Tensor, folder: Path, metadata: Mapping[str, str], name: str = "model"
    ) -> Artifact:
        """Write `name.torchscript` and check it.

        Args:
            model: Any device and mode; never changed.
            example: `(1, C, H, W)` float32 normalised input.
            folder: Where the file goes; exists.
            metadata: Text for the file's `extra/metadata.json`.
            name: The file's, without its suffix.

        Returns:
            The file, already compared with `model`.

        Raises:
            CvtrainError: The model cannot be traced, or the file does not reproduce it.
            StorageError: The disk is full or read-only.
        """
        log.info("torchscript: PyTorch calls this format deprecated; export=torch_export is its successor")
        path = folder / f"{name}.torchscript"
        prepared = prepare(model, example, metadata, self.embed_preprocessing)
        with reporting("torchscript"), writing(path) as work:
            with asking("PyTorch cannot trace this model"), torch.no_grad():
                # What it gives is compared below, from the file and at several batch sizes.
                traced = torch.jit.trace(prepared.network, (prepared.pair,), check_trace=False)  # type: ignore[no-untyped-call]
                frozen = torch.jit.freeze(traced)
                torch.jit.save(frozen, work, _extra_files={METADATA: json.dumps(prepared.metadata)})
            compare(prepared, work, TORCHSCRIPT)
        return Artifact("torchscript", path, TORCHSCRIPT, count_params(model), count_macs(model, example))
