"""Where numbers and pictures go besides results.csv; the `logger` group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.logger.lines import METRICS_FILE, JsonLines, read_metrics

__all__ = ["METRICS_FILE", "JsonLines", "NoLogger", "TensorBoard", "read_metrics"]


class NoLogger:
    """Writes nothing; results.csv and metrics.json are always there."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Drop values."""

    def pictures(self, name: str, images: Tensor, step: int) -> None:
        """Drop pictures."""

    def figure(self, name: str, png: NDArray[np.uint8], step: int) -> None:
        """Drop a figure."""

    def hparams(self, config: dict[str, Any], metrics: dict[str, float], step: int = 0) -> None:
        """Drop settings."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _leave_writer_errors_to_the_caller() -> None:
    """Keep TensorBoard's writer thread from printing a traceback: the next call raises the same OSError."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__name__ != "_AsyncWriterThread" or not isinstance(arguments.exc_value, OSError):
            before(arguments)

    if getattr(before, "__name__", "") != "hook":
        threading.excepthook = hook


class TensorBoard(JsonLines):
    """TensorBoard event files in the run folder, beside `metrics.jsonl`.

    A full disk turns a writer off with one warning; training goes on.

    Args:
        folder: The run folder.
        purge_step: Steps from here on that an earlier, interrupted part of the run logged are hidden; None: a new run.
        images: At most so many pictures of a batch.
    """

    def __init__(self, folder: Path, purge_step: int | None = None, images: int = 32) -> None:
        super().__init__(folder, purge_step)
        from torch.utils.tensorboard import SummaryWriter

        self.images = images
        self._writer: Any = None
        self._try(lambda: setattr(self, "_writer", SummaryWriter(str(folder), purge_step=purge_step)))
        _leave_writer_errors_to_the_caller()

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log each value under its name."""
        super().scalars(values, step)
        self._add_scalars(values, step)

    def _add_scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._try(lambda n=name, v=value: self._writer and self._writer.add_scalar(n, v, step))  # type: ignore[misc]

    def pictures(self, name: str, images: Tensor, step: int) -> None:
        """Log the first pictures as a grid, enlarged when they are tiny."""
        import torch.nn.functional as F
        from torchvision.utils import make_grid

        shown = images[: self.images].detach().float().cpu().clamp(0, 1)
        if shown.shape[-1] < 64:
            shown = F.interpolate(shown, scale_factor=max(1, 64 // shown.shape[-1]), mode="nearest")
        self._try(
            lambda: (
                self._writer
                and self._writer.add_image(name, make_grid(shown[:, :3] if shown.shape[1] >= 3 else shown[:, :1]), step)
            )
        )

    def figure(self, name: str, png: NDArray[np.uint8], step: int) -> None:
        """Log a `(H, W, 3)` uint8 picture."""
        self._try(lambda: self._writer and self._writer.add_image(name, png, step, dataformats="HWC"))

    def hparams(self, config: dict[str, Any], metrics: dict[str, float], step: int = 0) -> None:
        """Log settings and final metrics for the HPARAMS page, in this folder rather than one of their own."""
        from torch.utils.tensorboard.summary import hparams

        plain = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in config.items()
        }
        for summary in hparams(plain, metrics):  # type: ignore[no-untyped-call]
            self._try(lambda s=summary: self._writer and self._writer.file_writer.add_summary(s))  # type: ignore[misc]
        self._add_scalars(metrics, step)

    def flush(self) -> None:
        """Bring everything to the disk."""
        super().flush()
        self._try(lambda: self._writer and self._writer.flush())

    def close(self) -> None:
        """Finish the event file."""
        super().close()
        self._try(lambda: self._writer and self._writer.close())

    def _try(self, write: Callable[[], object]) -> None:
        self._guarded("TensorBoard", write, lambda: setattr(self, "_writer", None))
