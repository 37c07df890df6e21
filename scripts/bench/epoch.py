#!/usr/bin/env python3
"""A whole epoch, loader and step: the textbook script against cvtrain's defaults, and the accuracy both end with.

Fashion-MNIST at 32x32 where its files lie in --root, else crops of noise of the shape of CIFAR-10. The textbook: PIL
transforms a sample, DataLoader with 0 and 2 workers, float32. cvtrain: its defaults with precision=amp.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from common import Row, interleaved, parser, rates, report
from hydra import version
from PIL import Image
from scipy.stats import ttest_ind
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from cvtrain.build import Builder
from cvtrain.command.train import build_run
from cvtrain.compose import Composer
from cvtrain.core.types import DataSets, Preprocess
from cvtrain.data import ArraySource, FashionMNIST
from cvtrain.engine.loop import evaluate, fit, train_epoch
from cvtrain.engine.run import TrainRun
from cvtrain.engine.signals import StopRequest

ROOT = "/usr/share/datasets/fashion-mnist"
SIZE, LR, SMOOTHING = 32, 0.1, 0.1
SPEED = {"SimpleCNN": ["model=simple_cnn"], "ResNet-18 small stem": ["model=resnet18"]}
ACCURACY = {"SimpleCNN": SPEED["SimpleCNN"], "ResNet-18": ["model=resnet18", "model.small_stem=false"]}
"""The ResNet with the stem for large pictures: a twelfth of the arithmetic, so that seeds can be told from loops."""


@dataclass(frozen=True)
class Data:
    """Pictures in memory: uint8 `(N, 32, 32, C)` and labels `(N,)`, to train on and to test with."""

    name: str
    train: np.ndarray[Any, np.dtype[np.uint8]]
    labels: np.ndarray[Any, np.dtype[np.int64]]
    test: np.ndarray[Any, np.dtype[np.uint8]]
    test_labels: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def channels(self) -> int:
        """Return C."""
        return int(self.train.shape[-1])

    def first(self, count: int) -> Data:
        """Return the same with fewer pictures to train on; as many of the test at most."""
        tests = min(len(self.test), max(500, count // 2))
        return Data(self.name, self.train[:count], self.labels[:count], self.test[:tests], self.test_labels[:tests])

    def sets(self) -> DataSets:
        """Return them as cvtrain takes them; the test pictures choose no checkpoint here."""
        held_out = _source(self.test, self.test_labels)
        statistics = (0.5,) * self.channels, (0.25,) * self.channels
        preprocess = Preprocess(SIZE, SIZE, self.channels, *statistics)
        names = [str(k) for k in range(10)]
        return DataSets(self.name, names, preprocess, _source(self.train, self.labels), held_out, held_out)


def read_data(root: str) -> Data:
    """Return Fashion-MNIST padded to 32x32, or noise."""
    if Path(root).is_dir():
        parts = FashionMNIST(root=root).read().parts
        pad = ((0, 0), (2, 2), (2, 2), (0, 0))
        train, test = (np.pad(parts[split].pictures, pad) for split in ("train", "test"))
        order = np.random.default_rng(0).permutation(len(train))
        labels, test_labels = (parts[split].labels.astype(np.int64) for split in ("train", "test"))
        return Data("Fashion-MNIST", train[order], labels[order], test, test_labels)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (12_000, SIZE, SIZE, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, len(noise))
    return Data("noise", noise[:10_000], labels[:10_000], noise[10_000:], labels[10_000:])


def _source(pixels: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> ArraySource:
    return ArraySource(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels, [""] * len(labels))


class Samples(Dataset[tuple[Tensor, int]]):
    """The textbook's data set: one PIL picture and its transforms at a time."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(SIZE, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * data.channels, (0.25,) * data.channels),
            ]
        )

    def __len__(self) -> int:
        return len(self.data.train)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = Image.fromarray(self.data.train[index].squeeze())
        return self.transform(picture), int(self.data.labels[index])


class Textbook:
    """The script of the tutorials: one-cycle SGD, float32, loss and accuracy read in each step."""

    def __init__(self, data: Data, builder: Builder, epochs: int, workers: int) -> None:
        self.data = data
        batch = builder.config["batch_size"]
        self.loader = DataLoader(Samples(data), batch, shuffle=True, num_workers=workers, worker_init_fn=_one_thread)
        self.model = builder.model(data.sets())
        self.optimizer = torch.optim.SGD(self.model.parameters(), LR, 0.9, weight_decay=5e-4, nesterov=True)
        steps = epochs * len(self.loader)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, LR, steps, cycle_momentum=False)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)

    def epoch(self) -> float:
        """Train once through the data; return the training accuracy."""
        self.model.train()
        loss_sum = right = 0.0
        for images, labels in self.loader:
            self.optimizer.zero_grad()
            logits = self.model(images)
            loss = self.criterion(logits, labels)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            loss_sum += loss.item()
            right += (logits.argmax(1) == labels).sum().item()
        return right / len(self.data.train)

    @torch.inference_mode()
    def accuracy(self) -> float:
        """Return the accuracy on the test pictures."""
        self.model.eval()
        pixels = torch.from_numpy(self.data.test).permute(0, 3, 1, 2).float()
        right = 0
        for images, labels in zip(pixels.split(256), torch.from_numpy(self.data.test_labels).split(256), strict=True):
            right += int((self.model((images / 255 - 0.5) / 0.25).argmax(1) == labels).sum())
        return right / len(self.data.test)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def make_builder(model: Sequence[str], epochs: int, seed: int = 0) -> Builder:
    """Return the config of cvtrain's side: its defaults, and the format that the device does fast."""
    words = [*model, "precision=amp", "loader=device", "aug=weak", f"epochs={epochs}", "batch_size=128"]
    version.setbase("1.3")
    _, config = Composer("train", None).check([*words, f"optimizer.lr={LR}", f"seed={seed}", "logger=none"], [])
    return Builder(config, [])


def make_run(builder: Builder, data: Data) -> TrainRun:
    """Return a run of cvtrain."""
    folder = Path(tempfile.mkdtemp(prefix="bench-epoch-"))
    (folder / "weights").mkdir()
    return build_run(builder, data.sets(), torch.device("cpu"), folder, StopRequest())


def speed(case: str, model: Sequence[str], data: Data, slow: int, fast: int, rounds: int) -> list[Row]:
    """Return pictures a second of an epoch; the textbook's has `slow` pictures, cvtrain's `fast`: it would be over.

    Args:
        case: For the rows.
        model: Words of the command line.
        data: What to train on.
        slow: Pictures in the textbook's epoch.
        fast: Pictures in cvtrain's.
        rounds: Epochs of each variant.
    """
    builder = make_builder(model, 10**6)
    run = make_run(builder, data.first(fast))

    def ours() -> None:
        train_epoch(run, 0.0)
        run.state.end_epoch(run.state.means())

    def timed(train: Callable[[], object], count: int) -> Callable[[], float]:
        def pictures_a_second() -> float:
            start = time.perf_counter()
            train()
            return count / (time.perf_counter() - start)

        return pictures_a_second

    books = {f"textbook, {n} workers": Textbook(data.first(slow), builder, 10**4, n).epoch for n in (0, 2)}
    passes = {name: timed(epoch, slow) for name, epoch in books.items()} | {"cvtrain": timed(ours, fast)}
    found = interleaved(passes, rounds)
    best = max(books, key=lambda name: sorted(found[name])[rounds // 2])
    return rates(case, found, "pictures/s", best)


def accuracies(case: str, model: Sequence[str], data: Data, epochs: int, seeds: int) -> list[Row]:
    """Return the mean test accuracy of both, its spread over the seeds, and Welch's 95 % interval of the difference."""
    found: dict[str, list[float]] = {"textbook": [], "cvtrain": []}
    for seed in range(seeds):
        builder = make_builder(model, epochs, seed)
        torch.manual_seed(seed)
        book = Textbook(data, builder, epochs, 0)
        for _ in range(epochs):
            book.epoch()
        found["textbook"].append(100 * book.accuracy())
        run = make_run(builder, data)
        fit(run)
        found["cvtrain"].append(100 * evaluate(run, "test").compute()["acc"])
        print(f"{case}: seed {seed}, {found['textbook'][-1]:.2f} and {found['cvtrain'][-1]:.2f} %", file=sys.stderr)
    base, ours = mean(found["textbook"]), mean(found["cvtrain"])
    rows = [Row(case, name, mean(values), "% right", "textbook", mean(values) / base) for name, values in found.items()]
    if seeds > 1:
        rows += [Row(case, f"{name}, std of seeds", stdev(v), "points", "textbook", 1.0) for name, v in found.items()]
        bounds = ttest_ind(found["cvtrain"], found["textbook"], equal_var=False).confidence_interval(0.95)
        told = {"difference": ours - base, "difference, low": bounds.low, "difference, high": bounds.high}
        rows += [Row(case, name, value, "points", "textbook", ours / base) for name, value in told.items()]
    return rows


def main() -> None:
    """Measure both networks."""
    parsing = parser(str(__doc__).splitlines()[0])
    parsing.add_argument("--root", default=ROOT, help="folder of Fashion-MNIST's files")
    parsing.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parsing.add_argument("--part", choices=("speed", "accuracy"), help="one of both; accuracy needs no quiet machine")
    args: argparse.Namespace = parsing.parse_args()
    torch.set_num_threads(args.threads)
    data, rows = read_data(args.root), []
    for name, model in SPEED.items():
        small = name == "SimpleCNN"
        slow, rounds = (256, 2) if args.quick else (6_400, 7) if small else (512, 5)
        case = f"{name}, {data.name}"
        if args.only in case and args.part != "accuracy":
            rows += speed(case, model, data, slow, slow * (4 if small else 2), rounds)
    for name, model in ACCURACY.items():
        case = f"{name}, {data.name}, accuracy"
        if args.only in case and args.part != "speed" and data.name != "noise":
            pictures, epochs, seeds = (1_280, 2, 2) if args.quick else (12_800, 8, 5)
            rows += accuracies(case, model, data.first(pictures), epochs, seeds)
    report(rows, args, [
        f"{args.threads} thread(s), batch 128; both augment by a shift of up to 4 pixels and a flip, and normalise.",
        "ratio: to the better of the textbook's 0 and 2 workers, above 1 is better; no start-up of a run is counted.",
        "difference: of the mean accuracies, with Welch's 95 % interval over the seeds.",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
