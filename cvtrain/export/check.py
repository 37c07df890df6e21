"""Is the file that was just written the network? Asked of the file's own runtime."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain import runtime as runtimes
from cvtrain.errors import ConfigError
from cvtrain.export.network import Prepared
from cvtrain.export.writing import ExportError, first_line

BATCH_SIZES = (1, 2, 7)
TOLERANCE = 1e-4
"""Largest difference of an answer, as a share of the largest answer (of 1 where all are smaller)."""
MAGNIFIED = 1e-2
"""The same for a network that magnifies rounding: what differs by less is left to the proof on real pictures."""


def compare(prepared: Prepared, path: Path, runtime: str, batch_sizes: tuple[int, ...] = BATCH_SIZES) -> None:
    """Load the file in its own runtime and hold its metadata and answers against what was to be written.

    Args:
        prepared: The network, and the text that the file must carry.
        path: The file.
        runtime: One of `core.runtimes.RUNTIMES`.
        batch_sizes: Numbers of pictures to try.

    Raises:
        ConfigError: The runtime is not installed.
        ExportError: The file does not load or run, or its answers differ by more than `TOLERANCE`.
    """
    try:
        loaded = runtimes.load(runtime, path, torch.get_num_threads())
    except ConfigError:
        raise
    except Exception as error:
        raise ExportError(f"the file does not load in {runtime} ({first_line(error)})") from error
    lost = [key for key, value in prepared.metadata.items() if loaded.metadata.get(key) != value]
    if lost:
        raise ExportError(f"the file has lost {', '.join(lost)} of its metadata")
    generator = torch.Generator().manual_seed(0)
    for size in batch_sizes:
        batch = prepared.batch(size, generator)
        with torch.inference_mode():
            expected = prepared.network(batch).numpy()
        try:
            found = loaded.forward(batch.numpy())
        except Exception as error:
            raise ExportError(f"the file does not run in {runtime} at batch {size} ({first_line(error)})") from error
        scale = max(1.0, float(np.abs(expected).max()))
        difference = float(np.abs(found - expected).max()) / scale if found.shape == expected.shape else float("inf")
        allowed = TOLERANCE
        if TOLERANCE < difference <= MAGNIFIED and batch.is_floating_point():
            allowed = max(TOLERANCE, 4 * _rounding(prepared, batch, expected) / scale)
        if not difference <= allowed:
            raise ExportError(
                f"at batch {size} the file's {prepared.answer} differ from the model's by {difference:.2g} of the "
                f"largest; allowed is {allowed:.2g}"
            )


def _rounding(prepared: Prepared, batch: Tensor, expected: NDArray[np.float32]) -> float:
    """Return by how much the network's own answers are off because it computes in float32."""
    exact = copy.deepcopy(prepared.network).double()
    with torch.inference_mode():
        return float(np.abs(exact(batch.double()).numpy() - expected).max())
