"""Pictures of a finished run, or of anybody, and what its model makes of each: Grad-CAM, feature maps, errors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.command.predict import find_pictures
from cvtrain.command.results import write_csv
from cvtrain.data.picture import printable, read_picture
from cvtrain.errors import ConfigError, DataError
from cvtrain.evaluation.calibration import to_probabilities
from cvtrain.inspection.augmentation import channels_last
from cvtrain.inspection.cam import cam_layer, grad_cam
from cvtrain.inspection.maps import check_layer, chosen_maps, feature_maps
from cvtrain.inspection.mistakes import confused_pairs, worst_first
from cvtrain.report.grids import HEAT, coloured, enlarged, grid, overlay, shortened

if TYPE_CHECKING:
    from cvtrain.command.looking import Subject

log = logging.getLogger("cvtrain")

EXPLAINED, MAPPED, ERRORS = 12, 3, 24
"""Pictures of what=gradcam, of what=features and of what=errors."""
LAYERS, CHANNELS = 4, 8
"""Layers whose maps are shown where none are asked for, and maps of each."""
PAIRS, EXAMPLES = 8, 8
"""Most confused pairs of classes, and pictures of each."""
COLUMNS = 8


@dataclass(frozen=True)
class Picked:
    """Pictures to look at.

    Attributes:
        what: In words which ones: "worst errors of test".
        names: B of them.
        images: uint8 `(B, C, S, S)`, as the model sees them.
        labels: `(B,)` class numbers, or `(B, K)` of 0 and 1; None: not known.
    """

    what: str
    names: Sequence[str]
    images: Tensor
    labels: NDArray[np.int64] | None


Asked = list[tuple[int, str]]
"""Classes that a picture is asked about, and what each is to it: `predicted`, `true`."""


def gradcam(subject: Subject) -> list[str]:
    """Draw where the model looks for its answer and for the true class."""
    shipped, layer = subject.shipped, subject.config["layer"]
    if layer is not None:
        check_layer(shipped.model, layer, "layer")
    found = _pick(subject, EXPLAINED)
    inputs = shipped.preprocess.normalize(found.images.to(shipped.device))
    layer = layer or cam_layer(shipped.model, inputs[:1])
    with torch.no_grad():
        probabilities = to_probabilities(shipped.model(inputs).float().cpu(), shipped.temperature, shipped.multilabel)
    asked = _asked(probabilities, found.labels)
    pictures = [enlarged(picture) for picture in _visible(found.images)]
    cells = [[(picture, shortened(name))] for picture, name in zip(pictures, found.names, strict=True)]
    for rank in range(len(asked[0])):
        classes = torch.tensor([each[rank][0] for each in asked])
        heats = grad_cam(shipped.model, inputs, classes, layer)
        heats = F.interpolate(heats[:, None], size=pictures[0].shape[:2], mode="bilinear", align_corners=False)[:, 0]
        for i, (cell, heat) in enumerate(zip(cells, heats, strict=True)):
            number, role = asked[i][rank]
            said = f"{role} ({float(probabilities[i, number]):.2f})\n{shortened(shipped.class_names[number])}"
            cell.append((overlay(pictures[i], heat.numpy()), said))
    wide = 3 if len(cells) > 4 else min(2, len(cells))
    rows = [[part for cell in cells[i : i + wide] for part in cell] for i in range(0, len(cells), wide)]
    side = feature_maps(shipped.model, inputs[:1], [layer])[layer].shape[-1]
    grid(
        subject.folder / "gradcam.png",
        f"Grad-CAM of {layer} ({side}×{side}): {found.what}",
        [[picture for picture, _ in row] for row in rows],
        captions=[[text for _, text in row] for row in rows],
        group=len(cells[0]),
        scale=(HEAT, "nothing", "most that speaks for the class"),
    )
    return ["gradcam.png"]


def features(subject: Subject) -> list[str]:
    """Draw maps of some layers for some pictures, one file a picture."""
    shipped = subject.shipped
    for path in subject.config["layers"]:
        check_layer(shipped.model, path, "layers")
    found = _pick(subject, MAPPED)
    inputs = shipped.preprocess.normalize(found.images.to(shipped.device))
    maps = chosen_maps(shipped.model, inputs, subject.config["layers"], LAYERS)
    if not maps:
        raise ConfigError(f"what=features: {type(shipped.model).__name__} has no feature maps; name layers=[PATH].")
    files = []
    for i, (name, picture) in enumerate(zip(found.names, _visible(found.images), strict=True)):
        rows, names, captions = [[picture]], ["picture"], [[shortened(name)]]
        for path, of_layer in maps.items():
            one = of_layer[i]
            varied = one.flatten(1).std(1, correction=0)
            chosen = torch.sort(varied.topk(min(CHANNELS, len(one))).indices).values.tolist()
            rows.append([coloured(_stretched(one[k]), HEAT) for k in chosen])
            names.append(f"{shortened(path, 28)}\n{len(one)} × {one.shape[1]}×{one.shape[2]}")
            captions.append([str(k) for k in chosen])
        files.append(f"features_{i + 1}.png")
        grid(
            subject.folder / files[-1],
            f"Feature maps: of each layer the {CHANNELS} channels that vary most over the picture",
            *(rows, names),
            captions=captions,
            scale=(HEAT, "lowest", "highest value of the map"),
        )
    return files


def errors(subject: Subject) -> list[str]:
    """Draw the worst errors and the classes that are most often taken for another."""
    found, answers = _pick(subject, ERRORS), subject.answers
    pictures = _visible(found.images)
    rows = [pictures[i : i + COLUMNS] for i in range(0, len(pictures), COLUMNS)]
    chosen = _worst(subject, ERRORS)[0]
    asked = _asked(answers.probabilities[chosen], found.labels)
    texts = [
        f"{_named(subject, each[0], answers.probabilities[position])}\n{_truth(subject, each)}\n{shortened(name)}"
        for each, position, name in zip(asked, chosen, found.names, strict=True)
    ]
    captions = [texts[i : i + COLUMNS] for i in range(0, len(texts), COLUMNS)]
    grid(subject.folder / "errors.png", found.what.capitalize(), rows, captions=captions)
    if answers.multilabel or answers.correct.all():
        return ["errors.png"]
    return ["errors.png", *_pairs(subject)]


def _pairs(subject: Subject) -> list[str]:
    """Tabulate who is taken for whom, and draw examples of the most frequent."""
    answers, names = subject.answers, subject.shipped.class_names
    confidence = answers.probabilities.max(1).values.numpy()
    found = confused_pairs(answers.labels, answers.decided, confidence)
    write_csv(
        subject.folder / "confused_pairs.csv",
        [
            {
                "true": names[pair.true],
                "predicted": names[pair.predicted],
                "count": len(pair.positions),
                "support": pair.support,
                "share": len(pair.positions) / pair.support,
            }
            for pair in found
        ],
    )
    rows, heads, captions = [], [], []
    for pair in found[:PAIRS]:
        shown = pair.positions[:EXAMPLES]
        rows.append(_visible(_read(subject, shown)))
        heads.append(
            f"{shortened(names[pair.true])}\n→ {shortened(names[pair.predicted])}\n"
            f"{len(pair.positions)} of {pair.support}"
        )
        captions.append([f"{shortened(Path(answers.names[i]).name, 13)} ({confidence[i]:.2f})" for i in shown.tolist()])
    title = f"Most often taken for another: {answers.split}, true → predicted"
    grid(subject.folder / "confused_pairs.png", title, rows, heads, captions=captions)
    return ["confused_pairs.csv", "confused_pairs.png"]


def _pick(subject: Subject, count: int) -> Picked:
    """Return the first pictures of `source=`, or the worst errors of the split.

    Raises:
        DataError: A picture cannot be read.
    """
    config, prepared = subject.config, subject.shipped.preprocess
    if config["source"] is None:
        positions, what = _worst(subject, count)
        answers = subject.answers
        names = [Path(answers.names[i]).name for i in positions.tolist()]
        return Picked(what, names, _read(subject, positions), answers.labels[positions])
    if prepared.channels not in (1, 3):
        raise ConfigError(
            f"source={config['source']}: this model takes {prepared.channels} channels; leave source out."
        )
    sources = config["source"] if isinstance(config["source"], list) else [config["source"]]
    paths = [path for each in sources for path in find_pictures(str(each), lambda error: log.warning("%s", error))]
    if not paths:
        raise DataError(f"source={config['source']}: no picture there. Give a picture, a folder or a pattern.")
    if len(paths) > count:
        log.info("inspect: the first %d of %d pictures", count, len(paths))
    images = [
        read_picture(path, prepared.resize, prepared.channels, interpolation=prepared.interpolation)
        for path in paths[:count]
    ]
    names = [Path(printable(path)).name for path in paths[:count]]
    return Picked("your pictures", names, prepared.centre_crop(torch.stack(images)), None)


def _worst(subject: Subject, count: int) -> tuple[NDArray[np.int64], str]:
    """Return positions of the worst errors of the split and what they are in words; without errors the least sure."""
    answers = subject.answers
    probabilities = answers.probabilities.numpy()
    if answers.multilabel:
        off = np.abs(probabilities - answers.labels).max(1)
        confidence = np.where(answers.correct, 1 - off, off)
    else:
        confidence = probabilities.max(1)
    order, wrong = worst_first(answers.correct, confidence), int((~answers.correct).sum())
    if not wrong:
        return order[:count], f"no errors in {answers.split}; its least certain answers"
    which = f"the {count} worst of {wrong}" if wrong > count else f"all {wrong}"
    return order[: min(count, wrong)], f"{which} errors in {len(order):,} pictures of {answers.split}"


def _read(subject: Subject, positions: NDArray[np.int64]) -> Tensor:
    """Return pictures of the split, uint8 `(B, C, S, S)`, as the model sees them."""
    return subject.shipped.preprocess.centre_crop(subject.run.source(subject.config["split"]).read(positions))


def _asked(probabilities: Tensor, labels: NDArray[np.int64] | None) -> list[Asked]:
    """Return for each picture the classes worth asking about, equally many.

    Args:
        probabilities: `(B, K)`.
        labels: `(B,)`, `(B, K)` or None.
    """
    count = min(2, probabilities.shape[1])
    if labels is not None and labels.ndim == 2:
        # The labels that it is most wrong about.
        off = (probabilities - torch.from_numpy(labels)).abs().topk(count).indices.tolist()
        return [[(k, "labelled" if labels[i, k] else "not labelled") for k in row] for i, row in enumerate(off)]
    top = probabilities.topk(count).indices.tolist()
    if labels is None:
        return [list(zip(row, ("1st", "2nd"), strict=False)) for row in top]
    return [
        list(zip(row, ("predicted, right", "2nd"), strict=False))
        if row[0] == label
        else [(row[0], "predicted"), (label, "true")]
        for row, label in zip(top, labels.tolist(), strict=True)
    ]


def _named(subject: Subject, asked: tuple[int, str], probabilities: Tensor) -> str:
    return f"{shortened(subject.shipped.class_names[asked[0]], 15)} ({float(probabilities[asked[0]]):.2f})"


def _truth(subject: Subject, asked: Asked) -> str:
    number, role = asked[-1] if asked[-1][1] == "true" else asked[0]
    return f"true: {shortened(subject.shipped.class_names[number], 15)}" if role == "true" else role


def _visible(images: Tensor) -> list[NDArray[np.uint8]]:
    """Return uint8 `(B, C, H, W)` as pictures `(H, W, C)`; of other than 1 or 3 channels their mean."""
    if images.shape[1] not in (1, 3):
        images = images.float().mean(1, keepdim=True).round().to(torch.uint8)
    return list(channels_last(images))


def _stretched(values: Tensor) -> NDArray[np.float32]:
    """Return a map `(h, w)` stretched to 0..1."""
    low, high = values.min(), values.max()
    stretched: NDArray[np.float32] = ((values - low) / (high - low).clamp_min(1e-30)).numpy()
    return stretched
