"""Export to PyTorch's own graph format, `.pt2`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from torch.export import ExportedProgram

from cvtrain.core.artifact import TORCH_EXPORT
from cvtrain.export.check import BATCH_SIZES
from cvtrain.export.graph import GraphExporter
from cvtrain.export.network import Prepared
from cvtrain.export.writing import ExportError, asking
from cvtrain.runtime.archive import METADATA

log = logging.getLogger("cvtrain")


class TorchExport(GraphExporter):
    """Write the graph of PyTorch operators and its weights, which run without the model's Python code.

    For any batch size where the model allows it, otherwise for one picture. The archive holds the graph as JSON, each
    weight as raw bytes and the metadata as text. The one pickle that `torch.export.save` would put in, of the inputs
    it was traced with, is left out. `torch.export.load` would run a pickle that somebody else has put in: load only
    files you trust.
    """

    option, runtime, suffix = "torch_export", TORCH_EXPORT, ".pt2"

    def _write(self, prepared: Prepared, path: Path) -> tuple[int, ...]:
        program, sizes = _traced(prepared)
        for node in program.graph.nodes:  # they name the source lines and folders of this machine
            node.meta.pop("stack_trace", None)
        program.example_inputs = None
        with asking("PyTorch cannot save this model"):
            torch.export.save(program, path, extra_files={METADATA: json.dumps(prepared.metadata)})
        return sizes


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
