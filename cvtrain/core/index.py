"""artifacts.csv as the index of a run folder's artifacts; torch-free."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

from cvtrain.core.artifact import Artifact
from cvtrain.core.runtimes import RUNTIMES
from cvtrain.errors import WeightsError

INDEX, REFERENCE = "artifacts.csv", "fp32"
"""Name of the table in a run folder, and of its first row: the float model, which the others are compared with."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One row.

    Attributes:
        artifact: What it names.
        sha256: Hex, of the file as it was proved, and of what lies beside it as a part of it.
        latency_ms: Median milliseconds of a call with one picture.
    """

    artifact: Artifact
    sha256: str
    latency_ms: float


def read_index(path: Path) -> list[Entry]:
    """Return the rows of an artifacts.csv, the reference first; no file is looked at.

    Raises:
        WeightsError: The table is missing, damaged or of an older cvtrain.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("no rows")
        return [Entry(_artifact(row, path.parent), row["sha256"], float(row["latency_ms_p50"])) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} is no list of artifacts ({type(error).__name__}: {error}): missing, damaged or of an older "
            "cvtrain.\nRun the training again."
        ) from error


def is_older(path: Path) -> bool:
    """Return whether an artifacts.csv is of a cvtrain that wrote no hashes into it."""
    with path.open(newline="") as file:
        header = file.readline().strip().split(",")
    return "artifact" in header and "sha256" not in header


def check(entry: Entry, path: Path) -> None:
    """See that an artifact's file is the one that was proved.

    Args:
        entry: Its row.
        path: The table's.

    Raises:
        WeightsError: The file is missing or has changed.
    """
    artifact = entry.artifact
    lost = "delete the table" if artifact.name == REFERENCE else f"take the line of {artifact.name!r} out of {path}"
    fix = f"Bring it back, or {lost}."
    if not artifact.path.is_file():
        raise WeightsError(f"{artifact.path} is missing, which {path} names.\n{fix}")
    sha = hashlib.sha256()
    for part in parts(artifact.path):
        with part.open("rb") as file:
            while chunk := file.read(_CHUNK):
                sha.update(chunk)
    if sha.hexdigest() != entry.sha256:
        raise WeightsError(
            f"{artifact.path} has changed since it was proved: SHA-256 {sha.hexdigest()[:12]}…, not "
            f"{entry.sha256[:12]}….\n{fix}"
        )


def parts(path: Path) -> list[Path]:
    """Return a file and its companion: `.data` of an ONNX above 2 GB, `.bin` of an OpenVINO `.xml`."""
    beside = path.with_suffix(".bin") if path.suffix == ".xml" else path.with_name(path.name + ".data")
    return [path, beside] if beside.is_file() else [path]


def _artifact(row: dict[str, str], folder: Path) -> Artifact:
    if row["runtime"] not in RUNTIMES or row["exact"] not in ("true", "false"):
        raise ValueError(f"runtime {row['runtime']}, exact {row['exact']}")
    return Artifact(
        name=row["artifact"],
        path=folder / row["file"],
        runtime=row["runtime"],
        params=int(row["params"]),
        macs=int(row["macs"]),
        exact=row["exact"] == "true",
        note=row["note"],
    )
