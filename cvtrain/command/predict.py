"""`cvtrain predict run=FOLDER source=PICTURES`: classes and probabilities, one row a picture."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvtrain.command import deployed
from cvtrain.core.files import write_atomic
from cvtrain.data.picture import extensions, printable, read_picture
from cvtrain.errors import EXIT_OK, ConfigError, DataError
from cvtrain.evaluation.calibration import to_probabilities


def run(config: dict[str, Any], trusted: list[str]) -> int:
    """Print or write the predictions; return 0, or 3 when a picture could not be read (the others are there)."""
    if config["source"] is None:
        raise ConfigError("give source=PICTURE, a folder, or a pattern such as source='photos/*.jpg'.")
    output = config["output"]
    if output is not None and Path(str(output)).suffix not in (".csv", ".json"):
        raise ConfigError(f"output={output} must end in .csv or .json.")
    paths = find_pictures(str(config["source"]))
    shipped = deployed.load(config, trusted)
    if shipped.preprocess.channels not in (1, 3):
        raise ConfigError(
            f"this model takes {shipped.preprocess.channels} channels; predict reads pictures of 1 or 3. "
            "Measure it with cvtrain val on its own data."
        )
    topk = min(int(config["topk"]), len(shipped.class_names))
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for names, images in _batches(paths, shipped, int(config["batch_size"]), failed):
        rows += predict(shipped, names, images, topk)
    as_json = config["json"] or str(output).endswith(".json")
    text = json.dumps(rows) + "\n" if as_json else _csv(rows, shipped.multilabel, topk)
    if output is None:
        sys.stdout.write(text)
    else:
        write_atomic(Path(str(output)), text)
    for message in failed:
        sys.stderr.write(f"cvtrain: {message}\n")
    return DataError.exit_code if failed else EXIT_OK


@torch.inference_mode()
def predict(shipped: deployed.Deployed, names: list[str], images: Tensor, topk: int) -> list[dict[str, Any]]:
    """Return `file`, `label`, `probability` and, above one, the further classes of each picture, likeliest first.

    A multi-label model adds `labels`: all with a probability of 0.5 or more, in the order of the class list.

    Args:
        shipped: The model.
        names: B names.
        images: uint8 `(B, C, resize, resize)`.
        topk: Classes a picture, at most K.
    """
    logits = shipped.model(shipped.preprocess(images.to(shipped.device))).float()
    probabilities = to_probabilities(logits, shipped.temperature, shipped.multilabel)
    top = probabilities.topk(topk, dim=1)
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        row: dict[str, Any] = {"file": name}
        if shipped.multilabel:
            row["labels"] = [shipped.class_names[k] for k in torch.nonzero(logits[i] >= 0).flatten().tolist()]
        for rank, (value, number) in enumerate(zip(top.values[i].tolist(), top.indices[i].tolist(), strict=True)):
            mark = "" if rank == 0 else f"_{rank + 1}"
            row |= {f"label{mark}": shipped.class_names[number], f"probability{mark}": round(value, 6)}
        rows.append(row)
    return rows


def find_pictures(source: str) -> list[str]:
    """Return the pictures that a file name, a folder (with its subfolders) or a pattern stands for, sorted.

    Raises:
        DataError: There is none.
    """
    if Path(source).is_dir():
        found = [str(Path(folder) / name) for folder, _, files in os.walk(source) for name in files]
        found = [path for path in found if Path(path).suffix.lower() in extensions() and Path(path).name[0] != "."]
    else:
        found = [source] if Path(source).exists() else glob.glob(source, recursive=True)  # noqa: PTH207 - absolute patterns
    if not found:
        raise DataError(
            f"source={source}: no picture there. Give a picture, a folder that holds some, or a pattern in quotes."
        )
    return sorted(found)


def _batches(
    paths: list[str], shipped: deployed.Deployed, size: int, failed: list[str]
) -> Iterator[tuple[list[str], Tensor]]:
    prepared = shipped.preprocess
    names: list[str] = []
    images: list[Tensor] = []
    for path in paths:
        try:
            images.append(read_picture(path, prepared.resize, prepared.channels, interpolation=prepared.interpolation))
            names.append(printable(path))
        except DataError as error:
            failed.append(str(error))
        if len(images) == size:
            yield names, torch.stack(images)
            names, images = [], []
    if images:
        yield names, torch.stack(images)


def _csv(rows: list[dict[str, Any]], multilabel: bool, topk: int) -> str:
    text = io.StringIO()
    marks = ["", *(f"_{i + 1}" for i in range(1, topk))]
    fields = [
        "file",
        *(["labels"] * multilabel),
        *(f"{kind}{mark}" for mark in marks for kind in ("label", "probability")),
    ]
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "labels": "|".join(row["labels"])} if multilabel else row for row in rows)
    return text.getvalue()
