#!/usr/bin/env python3
"""Test accuracy with ImageNet weights against the same network from scratch, at 100, 500 and all training pictures.

Colour emoji (npm emoji-datasource-google, Apache-2.0), 64×64, by their 9 categories, as an image folder; EfficientNet-
Lite0, whose weights scripts/efficientnet-lite0 takes from PyPI. Both arms have the same network, pictures, epochs,
augmentation, optimizer and schedule; the learning rate of each is the best of RATES by the validation accuracy at 500
pictures with the split and seed 100, which the figure does not use. --picture FILE draws the figure. Both arms train at
once, with a thread each; all takes 20 to 25 minutes on two quiet cores.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from common import Row, parser, report

REPOSITORY = Path(__file__).parents[2]
PACKAGE = "emoji-datasource-google@15.1.2"
SIDE = 64
SIZES = {100: 20, 500: 10, None: 5}
"""Training pictures (None: all) and epochs: few, so that 22 runs end soon; more of them help both arms."""
RATES = (5e-4, 2e-3)
TUNED_AT, TUNING_SEED = 500, 100
SEEDS = (0, 1, 2)
STUDENT_T = 4.303
"""Half-width of a 95 % interval in standard errors, for 3 values."""
ARMS = ("scratch", "pretrained")
COLOURS = {"scratch": "#777777", "pretrained": "#1f77b4"}


def cache() -> Path:
    """Return the folder that keeps what was fetched for the next time."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cvtrain" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def emoji() -> Path:
    """Return `CATEGORY/CODE.png` of all emoji, fetched from npm where they are not there yet."""
    folder = cache() / "emoji"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=cache()) as temporary:
        command = ["npm", "pack", "--silent", "--pack-destination", temporary, PACKAGE]
        subprocess.run(command, check=True, capture_output=True)
        made = Path(temporary) / "emoji"
        with tarfile.open(next(Path(temporary).glob("*.tgz"))) as archive:
            listed = archive.extractfile("package/emoji.json")
            if listed is None:
                raise SystemExit(f"transfer: {PACKAGE} has no emoji.json")
            rows = [row for row in json.load(listed) if row["has_img_google"] and row["category"] != "Component"]
            places = {f"package/img/google/{SIDE}/{row['image']}": row["category"] for row in rows}
            for member in archive:
                if member.name in places and (content := archive.extractfile(member)) is not None:
                    path = made / places[member.name].replace(" & ", "-").lower() / Path(member.name).name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content.read())
        made.replace(folder)
    return folder


def weights() -> Path:
    """Return the converted weights, made where they are not there yet."""
    path = cache() / "efficientnet-lite0.safetensors"
    if not path.is_file():
        subprocess.run([REPOSITORY / "scripts" / "efficientnet-lite0", path], check=True, stdout=sys.stderr)
    return path


class Campaign:
    """Runs the command line, one run after the other.

    Args:
        outputs: Where the run folders go.
        quick: Few steps.
    """

    def __init__(self, outputs: Path, quick: bool) -> None:
        self.outputs = outputs
        self.quick = quick
        self.photos, self.weights = emoji(), weights()

    def metrics(self, arm: str, limit: int | None, seed: int, lr: float) -> dict[str, float]:
        """Train once and return the metrics, of val for the best epoch and of test."""
        epochs = 1 if self.quick else SIZES[limit]
        command = [
            *(sys.executable, "-m", "cvtrain", "data=folder", f"data.root={self.photos}", f"img_size={SIDE}"),
            # Without small_stem=false the network from scratch would be another one, and four times as slow.
            *("model=timm", "model.name=tf_efficientnet_lite0", "model.small_stem=false"),
            *("aug=weak", "optimizer=adamw", f"optimizer.lr={lr}", "scheduler=cosine", "batch_size=32"),
            *(f"epochs={epochs}", f"seed={seed}", f"data.split_seed={seed}", "monitor=val/acc"),
            *(
                "compression=none",
                "export=none",
                "logger=none",
                f"output_dir={self.outputs / arm}",
                "json=true",
                "threads=1",
            ),
            *([f"pretrained={self.weights}"] if arm == "pretrained" else []),
            *([f"data.limit={limit}"] if limit is not None else []),
            *(["limit_train_batches=2"] if self.quick else []),
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"transfer: {' '.join(command)} ended with {done.returncode}\n{done.stderr}")
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])["metrics"]
        accuracies = {name: round(found[name], 4) for name in ("val/acc", "test/acc")}
        print(f"{arm} {limit or 'all'} seed {seed} lr {lr:g}: {accuracies}", file=sys.stderr)
        return found

    def best_rate(self, arm: str) -> float:
        """Return the learning rate with the best validation accuracy."""
        rates = RATES[:1] if self.quick else RATES
        return max(rates, key=lambda lr: self.metrics(arm, TUNED_AT, TUNING_SEED, lr)["val/acc"])


def interval(values: Sequence[float]) -> float:
    """Return the half-width of the 95 % interval of the mean, by Student's t; 0 for a single value."""
    return STUDENT_T * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def draw(found: dict[tuple[str, str], list[float]], path: Path) -> None:
    """Draw mean, interval and single runs of each arm over the number of training pictures."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for _, name in found))
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for arm in ARMS:
        values = [found[arm, name] for name in names]
        axis.errorbar(
            range(len(names)),
            [mean(row) for row in values],
            [interval(row) for row in values],
            **{"color": COLOURS[arm], "marker": "o", "capsize": 4},
            label="ImageNet weights" if arm == "pretrained" else "from scratch",
        )
        for position, row in enumerate(values):
            axis.plot([position + 0.05] * len(row), row, ".", color=COLOURS[arm], alpha=0.5)
    axis.set_xticks(range(len(names)), names)
    axis.set_xlabel("training pictures")
    axis.set_ylabel("test accuracy, %")
    axis.set_title("EfficientNet-Lite0 on 9 categories of emoji, 64×64\nmean and 95 % interval of 3 splits and seeds")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Choose the rates, train both arms at every size with every seed, report and draw."""
    made = parser(str(__doc__).splitlines()[0])
    made.add_argument("--picture", type=Path, help="draw the figure into this file")
    args = made.parse_args()
    sizes, seeds = (list(SIZES)[:1], SEEDS[:1]) if args.quick else (list(SIZES), SEEDS)
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        campaign = Campaign(Path(temporary), args.quick)
        with ThreadPoolExecutor(len(ARMS)) as pool:
            rates = dict(zip(ARMS, pool.map(campaign.best_rate, ARMS), strict=True))
            for limit, seed in itertools.product(sizes, seeds):
                runs = {arm: pool.submit(campaign.metrics, arm, limit, seed, rates[arm]) for arm in ARMS}
                for arm, run in runs.items():
                    found.setdefault((arm, str(limit or "all")), []).append(100 * run.result()["test/acc"])
    rows = []
    for (arm, name), values in found.items():
        base = mean(found["scratch", name]) or math.inf  # after the few steps of --quick nothing may be right
        rows.append(Row(f"{name} training pictures", arm, mean(values), "%", "scratch", mean(values) / base))
    singly = "; ".join(
        f"{name} {arm}: {mean(values):.1f} ± {interval(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})"
        for (arm, name), values in found.items()
    )
    epochs = ", ".join(f"{count} at {size or 'all'}" for size, count in SIZES.items())
    notes = [
        f"test accuracy, mean ± half of the 95 % interval over seeds (of run and split) {list(seeds)}: {singly}",
        f"EfficientNet-Lite0 at {SIDE} px, AdamW, cosine, batch 32, aug=weak, epochs {epochs}; learning rates {rates}, "
        f"the best of {list(RATES)} by validation accuracy at {TUNED_AT} pictures with seed {TUNING_SEED}",
    ]
    report(rows, args, notes)
    if args.picture:
        draw(found, args.picture)


if __name__ == "__main__":
    main()
