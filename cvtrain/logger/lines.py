"""`metrics.jsonl`: every logged value, one JSON object a line, written so that a kill costs one line at most."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.core.files import to_json_line, write_atomic
from cvtrain.errors import StorageError

log = logging.getLogger("cvtrain")

METRICS_FILE = "metrics.jsonl"


class JsonLines:
    """Scalars in `metrics.jsonl` of the run folder: `{"step": 50, "train/loss": 0.5}`, a line a call.

    This file, not TensorBoard's, is the truth about a run: one damaged byte hides all that follows it in an event file,
    and one line here. A disk that is full or read-only turns the writer off with one warning; training goes on.

    Args:
        folder: The run folder.
        purge_step: The first step that a resumed run will log: lines from there on were written before the kill and
            are taken out. None: a new run, which begins with an empty file.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self.path = folder / METRICS_FILE
        self._descriptor: int | None = None
        self._guarded("metrics.jsonl", lambda: self._open(purge_step), self._turn_lines_off)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write values by name; NaN and infinity become null."""
        if self._descriptor is not None and values:
            line = (to_json_line({"step": step, **values}) + "\n").encode()
            self._guarded("metrics.jsonl", lambda: self._write(line), self._turn_lines_off)

    def pictures(self, name: str, images: Tensor, step: int) -> None:
        """Drop pictures."""

    def figure(self, name: str, png: NDArray[np.uint8], step: int) -> None:
        """Drop a figure; it is a file of the run folder."""

    def hparams(self, config: dict[str, object], metrics: dict[str, float], step: int = 0) -> None:
        """Drop settings; args.yaml and metrics.json hold them."""

    def flush(self) -> None:
        """Bring everything to the disk."""
        if self._descriptor is not None:
            descriptor = self._descriptor
            self._guarded("metrics.jsonl", lambda: os.fsync(descriptor), self._turn_lines_off)

    def close(self) -> None:
        """Finish the file."""
        self.flush()
        self._turn_lines_off()

    def _open(self, purge_step: int | None) -> None:
        if self.path.exists():
            content = self.path.read_bytes()
            kept = b"".join(_kept(content, purge_step))
            if kept != content:
                write_atomic(self.path, kept)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _write(self, line: bytes) -> None:
        # Straight to the system, without a buffer: what a killed process has written stays, whole lines but the last.
        while line and self._descriptor is not None:
            line = line[os.write(self._descriptor, line) :]

    def _turn_lines_off(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _guarded(self, name: str, write: Callable[[], object], turn_off: Callable[[], None]) -> None:
        """Call `write`; an error of the disk turns that writer off, with one warning."""
        try:
            write()
        except (OSError, StorageError) as error:
            turn_off()
            log.warning("%s is off for the rest of this run: %s", name, str(error).splitlines()[0])


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """Return the lines of a `metrics.jsonl` in order of their steps; damaged and torn ones are left out.

    Lines of one step are one dictionary; of a value that was written twice the later one counts.
    """
    merged: dict[int, dict[str, float | None]] = {}
    for line in path.read_bytes().splitlines():
        values = _parsed(line)
        if values is not None:
            step = int(values["step"] or 0)
            merged.setdefault(step, {}).update(values)
    return [merged[step] for step in sorted(merged)]


def _kept(content: bytes, purge_step: int | None) -> list[bytes]:
    """Return the whole lines before `purge_step`; none for a new run."""
    if purge_step is None:
        return []
    lines = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    parsed = [(line, _parsed(line)) for line in lines]
    return [line for line, values in parsed if values is not None and int(values["step"] or 0) < purge_step]


def _parsed(line: bytes) -> dict[str, float | None] | None:
    """Return what a line holds, or None where it is damaged."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        return None
    return values
