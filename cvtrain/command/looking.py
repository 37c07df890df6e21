"""`cvtrain inspect run=FOLDER what=…`: look into the model of a finished run."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from numpy.typing import NDArray

from cvtrain import runs
from cvtrain.command import deployed
from cvtrain.command.answers import Answers, FinishedRun, answer, open_run
from cvtrain.command.results import write_csv
from cvtrain.core.anatomy import classifier
from cvtrain.core.files import storage_error, to_json_line
from cvtrain.core.random import generator
from cvtrain.errors import EXIT_OK, ConfigError
from cvtrain.inspection.filters import first_filters, scaled, strongest
from cvtrain.inspection.projection import penultimate, project
from cvtrain.inspection.weights import REACH, weight_statistics
from cvtrain.report.console import attach_log, make_console
from cvtrain.report.grids import SIGNED, coloured, grid
from cvtrain.report.layers import distributions
from cvtrain.report.scatter import classes

log = logging.getLogger("cvtrain")

TAKES = {
    "gradcam": {"source", "layer", "split"},
    "features": {"source", "layers", "split"},
    "filters": set(),
    "tsne": {"split", "seed"},
    "errors": {"split"},
    "weights": set(),
}
"""What there is to look at in a finished run, and the keys of its own that each takes."""
COMMON = {"what", "run", "weights", "device", "threads", "output_dir", "json", "trusted"}
FILTERS, CHANNELS, COLUMNS = 64, 8, 12
"""Most filters shown, input channels of one that is no colour picture, and filters a row."""
PROJECTED = 2000
"""Most pictures of a t-SNE: more take minutes, and hide each other."""
BATCH = 64


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes:
        config: Of the verb.
        trusted: The user's own packages.
        shipped: The model.
        folder: Where the files go.
    """

    config: dict[str, Any]
    trusted: list[str]
    shipped: deployed.Deployed
    folder: Path

    @cached_property
    def run(self) -> FinishedRun:
        """The finished run with its data.

        Raises:
            ConfigError: Only a file of weights was given.
        """
        if self.config["run"] is None:
            raise ConfigError(
                f"what={self.config['what']} looks at pictures of a run: give run=FOLDER in place of weights="
                + (", or source=PICTURES." if "source" in TAKES[self.config["what"]] else ".")
            )
        return open_run(Path(str(self.config["run"])).absolute(), self.config, self.trusted)

    @cached_property
    def answers(self) -> Answers:
        """What the model says of the split that is asked for."""
        return answer(self.run, self.run.artifacts[0], self.config["split"], torch.get_num_threads())


def run(config: dict[str, Any], trusted: list[str]) -> int:
    """Write what `config["what"]` asks for below the run's `inspect/` and print its folder; return 0.

    Raises:
        ConfigError: A key that means nothing here, or a layer that is not there.
        DataError: The data, which it needs, are gone or unreadable.
        WeightsError: The weights are missing or damaged.
    """
    from cvtrain.command import picked

    given = _given(config)
    attach_log(make_console(bool(config["json"])))
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    shipped = deployed.load(config, trusted)
    subject = Subject(config, trusted, shipped, _folder(config, "output_dir" in given))
    looks = {"gradcam": picked.gradcam, "features": picked.features, "errors": picked.errors}
    looks |= {"filters": _filters, "tsne": _tsne, "weights": _weights}
    files = looks[config["what"]](subject)
    told = {"run": str(subject.folder), "exit_code": EXIT_OK, "files": files}
    sys.stdout.write((to_json_line(told) if config["json"] else "\n".join([*files, str(subject.folder)])) + "\n")
    return EXIT_OK


def _given(config: dict[str, Any]) -> set[str]:
    """Return the keys on the command line, all of which mean something.

    Raises:
        ConfigError: One does not.
    """
    what = config["what"]
    if isinstance(config["run"], list):
        raise ConfigError(f"run={config['run']}: inspect looks at one run; give one folder.")
    words = {text.lstrip("+~").partition("=")[0]: text for text in HydraConfig.get().overrides.task}
    for key, text in words.items():
        users = [name for name, keys in TAKES.items() if key in keys]
        if users and what not in users:
            raise ConfigError(f"{text} is for what={' or '.join(users)}; leave it out with what={what}.")
        if not users and key not in COMMON:
            raise ConfigError(
                f"{text} means nothing with what={what}, which looks at a finished run with all that it was trained "
                "with.\nLeave it out."
            )
    if "split" in words and config["source"] is not None:
        raise ConfigError(f"{words['split']} chooses among the run's own pictures; leave it or source= out.")
    return set(words)


def _folder(config: dict[str, Any], chosen: bool) -> Path:
    if chosen or config["run"] is None:
        return runs.create_folder(Path(str(config["output_dir"])) / f"inspect_{config['what']}")
    folder = Path(str(config["run"])).absolute() / "inspect" / str(config["what"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    return folder


def _filters(subject: Subject) -> list[str]:
    """Draw the filters of the first convolution."""
    path, filters = first_filters(subject.shipped.model, subject.shipped.preprocess.shape)
    channels, height, width = filters.shape[1:]
    plain = channels in (1, 3)
    numbers = strongest(filters, FILTERS if plain else COLUMNS)
    values = scaled(filters[numbers]).numpy()
    if channels == 3:
        pictures = [np.asarray((255 * each.transpose(1, 2, 0)).round(), np.uint8) for each in values]
    else:
        pictures = [coloured(channel, SIGNED) for each in values for channel in each[:CHANNELS]]
    wide = COLUMNS if plain else min(CHANNELS, channels)
    shown = f"{len(numbers)} of {len(filters)}, the largest" if len(numbers) < len(filters) else f"all {len(filters)}"
    grid(
        subject.folder / "filters.png",
        f"Filters of {path}, {height}×{width}: {shown}" + ("; mid-grey is 0" if channels == 3 else ""),
        [pictures[i : i + wide] for i in range(0, len(pictures), wide)],
        [] if plain else [f"filter {number}" for number in numbers.tolist()],
        [] if plain else [f"channel {i}" for i in range(wide)],
        scale=None if channels == 3 else (SIGNED, "most negative", "most positive weight of a filter"),
    )
    return ["filters.png"]


def _weights(subject: Subject) -> list[str]:
    """Tabulate all parameters and draw the distributions of those that are matrices or filters."""
    found = weight_statistics(subject.shipped.model)
    write_csv(
        subject.folder / "weights.csv",
        [
            {
                "layer": each.name,
                "kind": each.kind,
                "shape": "×".join(map(str, each.shape)),
                "count": each.count,
                "mean": each.mean,
                "std": each.std,
                "min": each.lowest,
                "max": each.highest,
                "near_zero": each.near_zero,
            }
            for each in found
        ],
    )
    layers = [each for each in found if len(each.shape) > 1]
    zero = sum(each.near_zero * each.count for each in layers) / max(1, sum(each.count for each in layers))
    log.info("weights: %d layers; %.1f %% of the weights are near zero", len(layers), 100 * zero)
    distributions(layers, REACH, f"Weights of {type(subject.shipped.model).__name__}", subject.folder / "weights.png")
    return ["weights.csv", "weights.png"]


def _tsne(subject: Subject) -> list[str]:
    """Draw what the last layer gets of each picture in the plane."""
    shipped, seed, split = subject.shipped, subject.config["seed"], subject.config["split"]
    source = subject.run.source(split)
    path = classifier(shipped.model, shipped.preprocess.shape)
    chosen = np.arange(len(source))
    if len(chosen) > PROJECTED:
        chosen = np.sort(generator(seed, "tsne").permutation(chosen)[:PROJECTED])
    features, decided = [], []
    for first in range(0, len(chosen), BATCH):
        images = shipped.preprocess(source.read(chosen[first : first + BATCH]).to(shipped.device))
        given, logits = penultimate(shipped.model, images, path)
        features.append(given.numpy())
        decided.append(((logits >= 0).long() if shipped.multilabel else logits.argmax(1)).numpy())
    labels, said = source.labels[chosen], np.concatenate(decided)
    wrong = (labels != said).reshape(len(labels), -1).any(1)
    names = [*shipped.class_names, "(no label)"]
    shown, answered = (_first_label(each, len(names) - 1) for each in (labels, said))
    vectors = np.concatenate(features)
    places, method = project(vectors, seed)
    width = vectors.shape[1]
    log.info("%s: %d pictures of %s, each the %d numbers in front of %s", method, len(chosen), split, width, path)
    write_csv(
        subject.folder / "tsne.csv",
        [
            {"name": source.names[i], "label": names[label], "predicted": names[guess], "x": x, "y": y}
            for i, label, guess, (x, y) in zip(chosen, shown, answered, places.tolist(), strict=True)
        ],
    )
    title = f"{method} of the features in front of {path}: {split} pictures" + ", first labels" * shipped.multilabel
    classes(places, shown, wrong, names, title, subject.folder / "tsne.png")
    return ["tsne.csv", "tsne.png"]


def _first_label(labels: NDArray[np.int64], nothing: int) -> NDArray[np.int64]:
    """Return one class number a picture: of several labels the first, `nothing` where there is none."""
    if labels.ndim == 1:
        return labels
    return np.where(labels.any(1), labels.argmax(1), nothing).astype(np.int64)
