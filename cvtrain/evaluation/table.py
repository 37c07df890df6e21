"""artifacts.csv: what the proof has measured, and the index of a run folder's artifacts."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cvtrain.core import index
from cvtrain.core.artifact import Artifact
from cvtrain.core.files import write_atomic

_CHUNK = 1 << 20


@dataclass(frozen=True)
class ProofRow:
    """One artifact, as measured; the fields are the columns of artifacts.csv.

    Attributes:
        artifact: Its name.
        file: Its file, relative to the run folder where it lies inside.
        runtime: What ran it.
        accuracy: Share of right answers, 0..1.
        delta: Accuracy minus the reference's, -1..1.
        delta_low: Lower bound of the paired 95 % interval of `delta`.
        delta_high: Upper bound of it.
        agreement: Share of samples with the same answer as the reference, 0..1.
        max_logit_error: Largest absolute difference to the reference's logits, or of a file that gives probabilities
            to the reference's probabilities; NaN where one is.
        ece: Expected calibration error of its probabilities, 0..1.
        params: Number of parameters.
        macs: Multiply-accumulates for one picture.
        bytes: Size on disk.
        gzip_bytes: Size when compressed with gzip.
        latency_ms_p50: Median milliseconds of a call with one picture.
        latency_ms_p95: 95th percentile of them.
        batch: Pictures a call of the two following columns.
        latency_batch_ms_p50: Median milliseconds of a call with so many pictures.
        latency_batch_ms_p95: 95th percentile of them.
        memory_mb: Resident memory in MB that loading it and answering one picture took at most, above the process with
            the runtime's libraries; NaN where it ran in this process.
        sha256: Of the file, and of what lies beside it as a part of it.
        exact: Whether it had to give the reference's answers.
        note: What a reader should know.
    """

    artifact: str
    file: str
    runtime: str
    accuracy: float
    delta: float
    delta_low: float
    delta_high: float
    agreement: float
    max_logit_error: float
    ece: float
    params: int
    macs: int
    bytes: int
    gzip_bytes: int
    latency_ms_p50: float
    latency_ms_p95: float
    batch: int
    latency_batch_ms_p50: float
    latency_batch_ms_p95: float
    memory_mb: float
    sha256: str
    exact: bool
    note: str = ""


COLUMNS = tuple(entry.name for entry in dataclasses.fields(ProofRow))
"""The columns of artifacts.csv, in order."""


@dataclass(frozen=True)
class Bytes:
    """What an artifact's file weighs, and the weights that some formats keep beside it.

    Attributes:
        size: Bytes on disk.
        gzipped: Bytes when compressed with gzip at its default level.
        sha256: Hex, of the file and then of its companion, as `cat FILES | sha256sum` tells it.
    """

    size: int
    gzipped: int
    sha256: str


def weigh(path: Path) -> Bytes:
    """Read an artifact once and tell its size and hash."""
    size, gzipped, digest, packer = 0, 0, hashlib.sha256(), zlib.compressobj(wbits=31)
    for part in index.parts(path):
        with part.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                gzipped += len(packer.compress(chunk))
    return Bytes(size, gzipped + len(packer.flush()), digest.hexdigest())


def write_artifacts_csv(rows: Sequence[ProofRow], path: Path) -> None:
    """Write the rows as CSV with a header, durably.

    Args:
        rows: The reference first.
        path: The `.csv` file.

    Raises:
        StorageError: The disk is full or read-only; an old file stands.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow(_text(getattr(row, name)) for name in COLUMNS)
    write_atomic(path, text.getvalue())


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_artifacts_csv(path: Path) -> list[Artifact]:
    """Return the artifacts of a run folder, the reference first, and see that each file is the one that was proved.

    Args:
        path: The folder's artifacts.csv.

    Raises:
        WeightsError: The table is missing, damaged or of an older cvtrain; a file is missing or has changed.
    """
    entries = index.read_index(path)
    for entry in entries:
        index.check(entry, path)
    return [entry.artifact for entry in entries]
