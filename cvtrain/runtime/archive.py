"""What the runtimes that read archives have in common; torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvtrain.core.quiet import quiet
from cvtrain.errors import CvtrainError, WeightsError

METADATA = "metadata.json"
"""Name of the record that holds an artifact's metadata, as one JSON object."""


@contextmanager
def loading(path: Path, runtime: str) -> Iterator[None]:
    """Keep a library's chatter off the terminal while it loads `path`.

    Raises:
        WeightsError: It cannot load the file.
    """
    if not path.is_file():
        raise WeightsError(f"no file at {path}. Check the path, or export it again.")
    try:
        with quiet():
            yield
    except (MemoryError, CvtrainError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise WeightsError(f"{runtime} cannot load {path} ({reason}). Export it again.") from error


def in_parts(forward: Callable[[NDArray[Any]], NDArray[Any]], most: int) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Return `forward` for batches of any size, where it takes up to `most` pictures at once."""

    def parts(pixels: NDArray[Any]) -> NDArray[Any]:
        if len(pixels) <= most:
            return forward(pixels)
        return np.concatenate([forward(pixels[start : start + most]) for start in range(0, len(pixels), most)])

    return parts
