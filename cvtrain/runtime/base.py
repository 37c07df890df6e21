"""What every runtime gives: a loaded artifact, and one that runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cvtrain.core.artifact import Artifact


@dataclass(frozen=True)
class Loaded:
    """An artifact loaded fresh from its file.

    Attributes:
        forward: Maps `(B, C, H, W)` in C order to `(B, K)` float32, for every B of 1 or more: normalised float32 to
            logits, or where `embedded` uint8 pictures `(B, C, resize, resize)` as they are read to probabilities.
        metadata: The text that the file itself carries: `class_names`, `preprocess`, `temperature`, `task`, ….
        embedded: Whether preprocessing and probabilities are inside the file; `metadata["embedded"]` is "true" then.
    """

    forward: Callable[[NDArray[Any]], NDArray[Any]]
    metadata: dict[str, str]
    embedded: bool = False


class Running(Protocol):
    """An artifact that answers, in this process or in another one.

    Everything may raise `WeightsError` or `ConfigError` when the file cannot be loaded, and `WorkerError` when the
    process that runs it has died.
    """

    @property
    def metadata(self) -> dict[str, str]:
        """Return the text that the file carries; waits until it is loaded."""
        ...

    @property
    def embedded(self) -> bool:
        """Return whether it answers with probabilities; waits until it is loaded."""
        ...

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pictures `(B, C, resize, resize)` to logits, or where `embedded` probabilities, `(B, K)`.

        The pictures are prepared as the file says, and the columns are in the order of the file's own class names.
        """
        ...

    def time(self, batch: int, runs: int) -> list[float]:
        """Return the milliseconds of `runs` calls of the model on `batch` pictures that are prepared already."""
        ...

    def memory(self) -> float:
        """Return the peak of resident memory so far, in MB above what the process took before it loaded the file.

        NaN in this process, where it cannot be told from everything else.
        """
        ...

    def close(self) -> None:
        """Give back what it holds; may be called twice."""
        ...


Start: TypeAlias = Callable[["Artifact"], Running]
"""Starts an artifact; what it returns must be closed."""
