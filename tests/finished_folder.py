"""A run folder as predict sees it, made in a moment: an ONNX file, a table of artifacts."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
from artifact_files import described, write_linear

from cvtrain.core.types import Preprocess
from cvtrain.evaluation import COLUMNS, ProofRow, write_artifacts_csv

COLOURS = {"red": (220, 30, 20), "green": (20, 200, 40), "blue": (30, 40, 210), "grey": (128, 128, 128),
           "white": (255, 255, 255), "black": (0, 0, 0)}  # fmt: skip
"""Classes of `write_nearest`."""
SIDE = 8
PREPARED = Preprocess(SIDE, SIDE, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def write_nearest(path, prepared=PREPARED, names=tuple(COLOURS), **more):
    """Write an ONNX file that says which colour is nearest to a picture's second pixel of the second row."""
    side, channels = prepared.img_size, prepared.channels
    at, scale = side + 1, np.array(prepared.std)
    colours = np.array([COLOURS[name] for name in names]) / 255
    weight, bias = np.zeros((len(names), channels * side**2)), np.zeros(len(names))
    # -|x - c|² but for what all classes share, where x = std · input + mean.
    for k, colour in enumerate(colours):
        for c in range(channels):
            weight[k, c * side**2 + at] = 20 * colour[c] * scale[c]
            bias[k] += 10 * (2 * colour[c] * prepared.mean[c] - colour[c] ** 2)
    metadata = described(names, prepared, **{key: value for key, value in more.items() if isinstance(value, str)})
    return write_linear(path, weight, bias, metadata, embed=more.get("embed", False))


def write_run(folder: Path, rows=(), winner=None) -> Path:
    """Write what says that `folder` is a run's, with `rows` of (artifact in it, milliseconds)."""
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    (folder / "args.yaml").write_text("seed: 0\n")
    (folder / "metrics.json").write_text(json.dumps({"winner": winner}))
    if rows:
        write_artifacts_csv([_row(folder, artifact, latency) for artifact, latency in rows], folder / "artifacts.csv")
    return folder


def _row(folder, artifact, latency):
    kinds = {field.name: field.type for field in dataclasses.fields(ProofRow)}
    values = {name: {"str": "", "float": 0.5, "int": 1, "bool": True}[kinds[name]] for name in COLUMNS}
    digest = hashlib.sha256(artifact.path.read_bytes()).hexdigest()
    own = {"artifact": artifact.name, "file": str(artifact.path.relative_to(folder)), "runtime": artifact.runtime}
    own |= {"latency_ms_p50": latency, "sha256": digest, "exact": artifact.exact}
    return ProofRow(**{**values, **own})
