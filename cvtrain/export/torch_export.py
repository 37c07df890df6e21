"""Export to PyTorch's own graph format, `.pt2`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from cvtrain.core.artifact import TORCH_EXPORT, Artifact
from cvtrain.core.complexity import count_macs, count_params
from cvtrain.export.base import Exporter
from cvtrain.export.check import BATCH_SIZES, compare
from cvtrain.export.network import Prepared, prepare
from cvtrain.export.writing import ExportError, asking, reporting, writing
from cvtrain.runtime.archive import METADATA

log = logging.getLogger("cvtrain")


class TorchExport(Exporter):
    """Write the graph of PyTorch operators and its weights, which run without the model's Python code.

    The archive holds the graph as JSON, each weight as raw bytes and the metadata as text. The one pickle that
    `torch.export.save` would put in, of the inputs it was traced with, is left out. `torch.export.load` would run a
    pickle that somebody else has put in: load only files you trust.
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
        """Write `name.pt2` and check it; for any batch size where the model allows it, otherwise for one picture.

        Args:
            model: Any device and mode; never changed.
            example: `(1, C, H, W)` float32 normalised input.
            folder: Where the file goes; exists.
            metadata: Text for the file's `extra/metadata.json`.
            name: The file's, without its suffix.

        Returns:
            The file, already compared with `model`.

        Raises:
            CvtrainError: The model cannot be exported, or the file does not reproduce it.
            StorageError: The disk is full or read-only.
        """
        path = folder / f"{name}.pt2"
        prepared = prepare(model, example, metadata, self.embed_preprocessing)
        with reporting("torch_export"), writing(path) as work:
            program, sizes = _traced(prepared)
            for node in program.graph.nodes:  # they name the source lines and folders of this machine
                node.meta.pop("stack_trace", None)
            program.example_inputs = None
            with asking("PyTorch cannot save this model"):
                torch.export.save(program, work, extra_files={METADATA: json.dumps(prepared.metadata)})
            compare(prepared, work, TORCH_EXPORT, sizes)
        return Artifact("torch_export", path, TORCH_EXPORT, count_params(model), count_macs(model, example))


def _traced(prepared: Prepared) -> tuple[ExportedProgram, tuple[int, ...]]:
    """Return the graph, and batch sizes to compare it at."""
    batch = torch.export.Dim("batch")
    try:
        with asking("any batch size"):
            return torch.export.export(prepared.network, (prepared.pair,), dynamic_shapes=({0: batch},)), BATCH_SIZES
    except ExportError as error:
        log.info("torch_export: a batch of one, the model does not allow %s", error)
    with asking("PyTorch cannot export this model"):
        return torch.export.export(prepared.network, (prepared.images,)), (1,)
