"""`cvtrain inspect`: augmentation, learning rate and model of a run to come; what the model of a finished one does."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain import runs
from cvtrain.aug import Augmentation
from cvtrain.build import Builder
from cvtrain.core.files import to_json_line
from cvtrain.core.types import DataSets
from cvtrain.errors import EXIT_OK, ConfigError
from cvtrain.inspection.augmentation import (
    LAMBDAS,
    channels_last,
    cutmix_sweep,
    draws,
    mixup_sweep,
    shipped_operations,
)
from cvtrain.report.console import attach_log, make_console
from cvtrain.report.grids import grid

log = logging.getLogger("cvtrain")

DRAWS = 8
PICTURES = 4
BATCH = 24
COLUMNS = 8
PAIR = 2
STEPS = 100
SEEN = 0.8
"""Largest share of a picture's own label at which a mixture shows."""


def run(config: dict[str, Any], trusted: list[str]) -> int:
    """Write what `config["what"]` asks for and print its folder; return 0.

    Raises:
        ConfigError: A key that is for something else to look at.
        DataError: The data set cannot be read.
    """
    from cvtrain.command import looking

    if config["what"] in looking.TAKES:
        return looking.run(config, trusted)
    for key in ("run", "weights", "source", "layer", "layers"):
        if config[key]:
            raise ConfigError(
                f"{key}={config[key]} is of a finished run: add what={', '.join(looking.TAKES)}.\n"
                f"what={config['what']} looks at a run before it is started; leave {key} out."
            )
    if config["what"] == "model":
        from cvtrain.command import model_summary

        return model_summary.run(config, trusted)
    for key in ("models", "num_classes", "in_channels"):
        if config[key]:
            raise ConfigError(f"{key}={config[key]} is for what=model; leave it out with what={config['what']}.")
    if config["what"] == "lr":
        from cvtrain.command import learning_rate

        return learning_rate.run(config, trusted)
    return _augmentation(config, trusted)


def _augmentation(config: dict[str, Any], trusted: list[str]) -> int:
    attach_log(make_console(bool(config["json"])))
    builder = Builder({**config, "model": {}}, trusted)
    sets, _ = builder.data()
    folder = runs.create_folder(Path(str(config["output_dir"])) / f"inspect_{sets.name}")
    indices = _one_of_each(sets, PICTURES, config["seed"])
    images = sets.train.read(indices)
    size = sets.preprocess.img_size
    _operations(builder, sets, images, indices, folder)
    _mixing(sets, sets.preprocess.centre_crop(images), indices, folder, config["seed"])
    _batch(builder, sets, folder)
    files = sorted(path.name for path in folder.glob("*.png"))
    log.info("inspect: %d pictures of %d×%d examples", len(files), size, size)
    told = {"run": str(folder), "exit_code": EXIT_OK, "files": files}
    sys.stdout.write((to_json_line(told) if config["json"] else "\n".join([*files, str(folder)])) + "\n")
    return EXIT_OK


def _one_of_each(sets: DataSets, count: int, seed: int) -> NDArray[np.int64]:
    """Return training positions of as many different classes as there are."""
    labels = sets.train.labels if sets.train.labels.ndim == 1 else sets.train.labels.argmax(1)
    order = np.random.default_rng(seed).permutation(len(labels))
    _, first = np.unique(labels[order], return_index=True)
    rest = np.setdiff1d(np.arange(len(order)), first)
    chosen = np.concatenate([np.random.default_rng(seed).permutation(first), rest])[:count]
    # Pairs are mixed: an odd last one is left out.
    even: NDArray[np.int64] = order[chosen][: max(2, len(chosen) // 2 * 2)].astype(np.int64)
    return even


def _operations(builder: Builder, sets: DataSets, images: Tensor, indices: NDArray[np.int64], folder: Path) -> None:
    """Draw a grid for each operation of the chosen preset and of the shipped ones, and one overview."""
    chosen = {name: ("chosen", node) for name, node in (builder.config["aug"].get("sample") or {}).items() if node}
    targets = {node.get("_target_") for _, node in chosen.values()}
    shipped = {name: (preset, node) for name, preset, node in shipped_operations() if node["_target_"] not in targets}
    original = channels_last(sets.preprocess.centre_crop(images))
    overview: list[list[NDArray[np.uint8]]] = []
    names: list[str] = []
    for name, (preset, node) in {**chosen, **shipped}.items():
        try:
            always = {**node, "prob": 1.0} if "prob" in node else node
            op = builder.build(f"aug.sample.{name}", always)
        except ConfigError as error:
            log.info("inspect: %s is left out: %s", name, str(error).splitlines()[0])
            continue
        if hasattr(op, "adapt"):
            op.adapt(sets.preprocess)
        made = draws(
            op, name, images, indices, seed=builder.config["seed"], epochs=DRAWS, img_size=sets.preprocess.img_size
        )
        settings = ", ".join(
            f"{key} {value}" + (" (always, here)" if key == "prob" and value != 1 else "")
            for key, value in node.items()
            if key != "_target_"
        )
        columns = ["original", *(f"draw {i + 1}" for i in range(DRAWS))]
        title = f"{name}" + (f": {settings}" if len(settings) <= 90 else "")
        rows = [[original[i], *(one[i] for one in made)] for i in range(len(original))]
        grid(folder / f"operation_{name}.png", title, rows, column_names=columns)
        overview.append(rows[len(names) % len(rows)])
        names.append(name if preset == "chosen" else f"{name}\n({preset})")
    grid(
        folder / "operations.png",
        "Every operation: the picture, then eight draws",
        overview,
        names,
        ["original", *(str(i + 1) for i in range(DRAWS))],
    )


def _mixing(sets: DataSets, images: Tensor, indices: NDArray[np.int64], folder: Path, seed: int) -> None:
    if len(images) < PAIR:
        return
    labels = sets.train.labels[indices]
    names = [sets.class_names[int(label if np.ndim(label) == 0 else label.argmax())] for label in labels]
    sweep = mixup_sweep(images)
    pairs = len(images) // 2
    grid(
        folder / "mixup.png",
        "MixUp: λ x₁ + (1 - λ) x₂, the label with it",
        [[step[pair] for step in sweep] for pair in range(pairs)],
        captions=[
            [f"λ {lam:.3g}\n{_mixture(names[2 * pair], names[2 * pair + 1], lam)}" for lam in LAMBDAS]
            for pair in range(pairs)
        ],
    )
    found = cutmix_sweep(images[:2], seed, COLUMNS)
    grid(
        folder / "cutmix.png",
        f"CutMix of {names[1]} into {names[0]}: λ ~ Beta(α, α), the label by the area that is left",
        [list(pictures) for pictures, _ in found.values()],
        [f"α = {alpha:g}" for alpha in found],
        captions=[[f"λ {share:.2f}" for share in shares] for _, shares in found.values()],
    )


def _mixture(first: str, second: str, lam: float) -> str:
    parts = [f"{share:.2g} {name}" for share, name in ((lam, first), (1 - lam, second)) if share > 0]
    return "\n".join(part if len(part) < 18 else part[:16] + "…" for part in parts)


def _batch(builder: Builder, sets: DataSets, folder: Path) -> None:
    """Draw a training batch as the model would see it, mixed and with its labels."""
    seed, size = builder.config["seed"], sets.preprocess.img_size
    count = min(BATCH, len(sets.train))
    indices = np.random.default_rng(seed).permutation(len(sets.train))[:count].astype(np.int64)
    augmentation = builder.augmentation(sets.preprocess)
    images = augmentation.samples(sets.train.read(indices), indices, seed, 0, size).float()
    raw = torch.from_numpy(sets.train.labels[indices])
    targets = (raw if sets.multilabel else torch.nn.functional.one_hot(raw, sets.num_classes)).float()
    images, targets = _mixed(augmentation, images, targets, seed)
    pictures = channels_last(images.round().clamp(0, 255).to(torch.uint8))
    captions = [_label(row, sets.class_names) for row in targets]
    rows = [list(pictures[i : i + COLUMNS]) for i in range(0, count, COLUMNS)]
    said = [captions[i : i + COLUMNS] for i in range(0, count, COLUMNS)]
    grid(folder / "batch.png", f"A training batch of {sets.name}, augmented", rows, captions=said)


def _mixed(augmentation: Augmentation, images: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Mix as the first training step would that mixes enough to be seen."""
    for step in range(STEPS if augmentation.batch else 0):
        mixed, weights = augmentation.mix(images, targets, seed, step, 0)
        if float(weights[0].max()) < SEEN:
            return mixed, weights
    return images, targets


def _label(target: Tensor, names: list[str]) -> str:
    top = target.topk(min(2, len(target)))
    shares = [(float(p), names[int(k)]) for p, k in zip(top.values, top.indices, strict=True) if p > 0.005]
    texts = [name if share > 0.995 else f"{share:.2f} {name}" for share, name in shares]
    return "\n".join(text if len(text) < 20 else text[:18] + "…" for text in texts)
