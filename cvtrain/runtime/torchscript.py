"""TorchScript."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from cvtrain.core.runtimes import TORCHSCRIPT
from cvtrain.runtime.archive import METADATA, loading
from cvtrain.runtime.base import Loaded
from cvtrain.runtime.torch_export import calling


def load(path: Path, threads: int) -> Loaded:
    """Load a TorchScript file.

    Args:
        path: The file. Its code runs: it must be one that you trust.
        threads: Threads inside one operator, of this whole process.

    Raises:
        WeightsError: The file is missing or damaged.
    """
    texts: dict[str, Any] = {METADATA: ""}
    with loading(path, TORCHSCRIPT):
        module = torch.jit.load(path, map_location="cpu", _extra_files=texts)  # type: ignore[no-untyped-call]
        metadata = json.loads(texts[METADATA])
    return Loaded(calling(module, threads), metadata, metadata.get("embedded") == "true")
