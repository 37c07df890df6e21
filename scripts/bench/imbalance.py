#!/usr/bin/env python3
"""Recall of a class with a hundredth of the pictures: plain, sampler=balanced, class_weights=balanced, =effective.

T-shirts (5,000 training pictures) against shirts (50) of Fashion-MNIST, as a folder of PNGs; test is the official one,
1,000 of each. The real files must lie in --root.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from common import Row, arguments, report
from PIL import Image

from cvtrain.data import FashionMNIST

ROOT = "/usr/share/datasets/fashion-mnist"
CLASSES = {"t-shirt": (0, 5000), "shirt": (6, 50)}
MINORITY = "shirt"
VARIANTS = {
    "plain": [],
    "sampler=balanced": ["sampler=balanced"],
    "class_weights=balanced": ["class_weights=balanced"],
    "class_weights=effective": ["class_weights=effective"],
}


def write(folder: Path) -> None:
    """Write `train/CLASS/*.png` with the counts of `CLASSES`, and the whole official test split of both."""
    found = FashionMNIST(root=ROOT).read()
    for split, part in found.parts.items():
        for name, (number, limit) in CLASSES.items():
            (folder / split / name).mkdir(parents=True)
            members = [i for i, label in enumerate(part.labels.tolist()) if label == number]
            for i in members[: limit if split == "train" else None]:
                Image.fromarray(part.pictures[i, ..., 0]).save(folder / split / name / f"{i}.png")


def recalls(run: Path) -> dict[str, float]:
    """Return each class's recall on the test split, in percent."""
    with (run / "per_class.csv").open(newline="") as file:
        return {row["class"]: 100 * float(row["recall"]) for row in csv.DictReader(file)}


def train(folder: Path, outputs: Path, epochs: int, overrides: Sequence[str]) -> Path:
    """Run the command line and return the run folder."""
    command = [
        *(sys.executable, "-m", "cvtrain", "data=folder", f"data.root={folder / 'photos'}", "data.channels=1"),
        *("img_size=28", "aug=weak", f"epochs={epochs}", "compression=none", "export=none", "logger=none"),
        # A rare picture's weight is 50: at the default rate, unclipped, its steps would throw the model about.
        *("monitor=val/balanced_acc", "optimizer.lr=0.02", "clip_grad_norm=1.0", "data.val_fraction=0.2"),
        *(f"output_dir={outputs}", "json=true", *overrides),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Path(json.loads(done.stdout.splitlines()[-1])["run"])


def main() -> None:
    """Train every variant with every seed."""
    args = arguments(str(__doc__).splitlines()[0])
    seeds, epochs = ([0], 2) if args.quick else ([0, 1, 2], 8)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder / "photos")
        for seed in seeds:
            for name, overrides in VARIANTS.items():
                run = train(folder, folder / "outputs", epochs, [f"seed={seed}", f"data.split_seed={seed}", *overrides])
                found[name].append(recalls(run))
                print(f"seed {seed} {name}: {found[name][-1]}", file=sys.stderr)
    rows = []
    for what, pick in (
        ("recall of the minority (50)", lambda r: r[MINORITY]),
        ("recall of the majority (5000)", lambda r: r["t-shirt"]),
        ("balanced accuracy", lambda r: mean(r.values())),
    ):
        values = {name: mean(pick(result) for result in results) for name, results in found.items()}
        rows += [Row(what, name, value, "%", "plain", value / values["plain"]) for name, value in values.items()]
    single = "; ".join(
        f"{name}: {', '.join(f'{result[MINORITY]:.1f}' for result in results)}" for name, results in found.items()
    )
    report(
        rows, args, [f"means over seeds (of run and split) {seeds}, {epochs} epochs; minority recall singly: {single}"]
    )


if __name__ == "__main__":
    main()
