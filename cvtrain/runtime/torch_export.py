"""PyTorch's own graphs, `.pt2`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from cvtrain.core.runtimes import TORCH_EXPORT
from cvtrain.runtime.archive import METADATA, in_parts, loading
from cvtrain.runtime.base import Loaded


def load(path: Path, threads: int) -> Loaded:
    """Load a `.pt2` file; one that takes a single picture only is run picture by picture.

    Args:
        path: The file. `torch.export.load` may run what it finds there: it must be one that you trust.
        threads: Threads inside one operator, of this whole process.

    Raises:
        WeightsError: The file is missing or damaged.
    """
    texts = {METADATA: ""}
    with loading(path, TORCH_EXPORT):
        program = torch.export.load(path, extra_files=texts)
        metadata = json.loads(texts[METADATA])
        (source,) = program.graph_signature.user_inputs
        (node,) = (node for node in program.graph.nodes if node.name == source)
        forward = calling(program.module(check_guards=False), threads)
    fixed = node.meta["val"].shape[0]
    if isinstance(fixed, int):
        forward = in_parts(forward, fixed)
    return Loaded(forward, metadata, metadata.get("embedded") == "true")


def calling(module: Callable[[torch.Tensor], torch.Tensor], threads: int) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Return `module` as a function of arrays, on so many threads of this whole process."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)

    def forward(pixels: NDArray[Any]) -> NDArray[Any]:
        with torch.inference_mode():
            answers: NDArray[Any] = module(torch.from_numpy(pixels)).numpy()
        return answers

    return forward
