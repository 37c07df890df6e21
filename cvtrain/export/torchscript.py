"""Export to TorchScript, for LibTorch and programs that know no other format of PyTorch's."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from cvtrain.core.artifact import TORCHSCRIPT
from cvtrain.export.check import BATCH_SIZES
from cvtrain.export.graph import GraphExporter
from cvtrain.export.network import Prepared
from cvtrain.export.writing import asking
from cvtrain.runtime.archive import METADATA

log = logging.getLogger("cvtrain")


class TorchScript(GraphExporter):
    """Write the traced and frozen graph.

    The format holds a pickle by nature: the module's attributes are one, of tensors and plain values, which
    `torch.jit.load` reads with an interpreter of its own and not with Python's. Its code runs all the same: load only
    files you trust. PyTorch calls TorchScript deprecated; `torch_export` is its successor.
    """

    option, runtime, suffix = "torchscript", TORCHSCRIPT, ".torchscript"

    def _write(self, prepared: Prepared, path: Path) -> tuple[int, ...]:
        log.info("torchscript: PyTorch calls this format deprecated; export=torch_export is its successor")
        with asking("PyTorch cannot trace this model"), torch.no_grad():
            # What it gives is compared from the file, at several batch sizes.
            traced = torch.jit.trace(prepared.network, (prepared.pair,), check_trace=False)  # type: ignore[no-untyped-call]
            frozen = torch.jit.freeze(traced)
            torch.jit.save(frozen, path, _extra_files={METADATA: json.dumps(prepared.metadata)})
        return BATCH_SIZES
