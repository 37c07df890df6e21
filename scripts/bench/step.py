#!/usr/bin/env python3
"""Time and peak memory of a training step: cvtrain's loop, the textbook's, a timm-style one and Lightning's Trainer.

All train the same network from the same weights on the same batches in memory, with SGD of the same settings and
label smoothing. cvtrain is a real run, built from its config, with TensorBoard, progress display and metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Row, interleaved, parser, rates, report
from hydra import version
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cvtrain.build import Builder, lay_out
from cvtrain.command.train import build_run
from cvtrain.compose import Composer
from cvtrain.core.types import Batch, DataSets, Preprocess
from cvtrain.data import ArraySource
from cvtrain.engine.loop import train_epoch
from cvtrain.engine.run import TrainRun
from cvtrain.engine.signals import StopRequest
from cvtrain.report.console import Progressing

LR, MOMENTUM, DECAY, SMOOTHING, LOG_EVERY = 0.01, 0.9, 5e-4, 0.1, 50
Pass = Callable[[], float]
"""Trains on all batches once; returns microseconds a step."""


@dataclass(frozen=True)
class Format:
    """How numbers are computed and laid out."""

    name: str
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Return what a forward pass by hand runs in."""
        low = self.precision == "bf16"
        return torch.autocast(device.type, torch.bfloat16) if low else contextlib.nullcontext()


FORMATS = (
    Format("fp32"),
    Format("fp32 channels_last", channels_last=True),
    Format("bf16 channels_last", "bf16", channels_last=True),
    Format("fp32 compile", channels_last=True, compile=True),
)


@dataclass(frozen=True)
class Case:
    """A network and its batches.

    Attributes:
        name: For the rows.
        model: Overrides that choose it.
        channels: Of the pictures.
        size: Side of the pictures, in pixels.
        batch: Pictures in a step.
        steps: Steps in a pass.
    """

    name: str
    model: tuple[str, ...]
    channels: int
    size: int
    batch: int
    steps: int


MLP = Case("tiny MLP, batch 64", ("model._target_=tiny.mlp", "~model.widths", "trusted=[tiny]"), 1, 8, 64, 200)
RESNET18 = Case("ResNet-18 32x32, batch 128", ("model=resnet18",), 3, 32, 128, 2)  # a step takes seconds on a core


def _any(name: str, size: int, batch: int) -> Case:
    return Case(f"zoo: {name}", ("model=torchvision", f"model.name={name}"), 3, size, batch, 3)


ZOO = (
    Case("zoo: lenet5", ("model=lenet5",), 1, 28, 64, 40),
    Case("zoo: simple_cnn", ("model=simple_cnn",), 3, 32, 64, 10),
    *(_any(name, 32, 32) for name in ("resnet18", "resnet34", "resnet50")),
    *(_any(name, 64, 32) for name in ("mobilenet_v3_small", "efficientnet_b0")),
    *(_any(name, 64, 8) for name in ("convnext_tiny", "vit_b_16")),
)


class Bench:
    """One case in one format: the batches, and the loops that train on them.

    Args:
        case: The network and its batches.
        fmt: The number format.
        device: Where to train.
        overrides: Of cvtrain's config.
    """

    def __init__(self, case: Case, fmt: Format, device: torch.device, *overrides: str) -> None:
        self.case, self.fmt, self.device = case, fmt, device
        trusted = ["tiny"] if "trusted=[tiny]" in case.model else []
        words = [
            *case.model, "aug=none", "epochs=1000000", f"batch_size={case.batch}", f"precision={fmt.precision}",
            f"channels_last={fmt.channels_last}", f"compile={fmt.compile}", f"device={device}", "loader=device",
            f"optimizer.lr={LR}", f"log_every_steps={LOG_EVERY}", *overrides,
        ]  # fmt: skip
        version.setbase("1.3")
        _, config = Composer("train", None).check(words, trusted)
        self.builder = Builder(config, trusted)
        rng = np.random.default_rng(0)
        shape = (case.batch * case.steps, case.channels, case.size, case.size)
        pixels = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)).contiguous(
            memory_format=torch.channels_last
        )
        labels = rng.integers(0, 10, len(pixels))
        train = ArraySource(pixels, labels, [""] * len(pixels))
        few = ArraySource(pixels[:64], labels[:64], [""] * 64)
        preprocess = Preprocess(case.size, case.size, case.channels, (0.5,) * case.channels, (0.25,) * case.channels)
        self.sets = DataSets("pixels", [str(k) for k in range(10)], preprocess, train, few, few)
        self.raw = [
            Batch(pixels[i : i + case.batch].to(device), torch.from_numpy(labels[i : i + case.batch]).to(device), index)
            for i in range(0, len(pixels), case.batch)
            for index in [np.arange(i, i + case.batch)]
        ]
        layout = torch.channels_last if fmt.channels_last else torch.contiguous_format
        # As the textbook has them: normalised float pictures (B, C, H, W).
        self.batches = [(preprocess.normalize(b.images).contiguous(memory_format=layout), b.targets) for b in self.raw]

    def model(self) -> nn.Module:
        """Return the network with the weights that all begin with, compiled where the format says so."""
        model = lay_out(self.builder.model(self.sets), self.device, self.fmt.channels_last)
        return torch.compile(model, dynamic=False) if self.fmt.compile else model  # type: ignore[return-value]

    def timed(self, train: Callable[[], object]) -> float:
        """Return microseconds a step of `train`, which takes them all."""
        self._wait()
        start = time.perf_counter()
        train()
        self._wait()
        return (time.perf_counter() - start) / self.case.steps * 1e6

    def textbook(self, fused: bool | None = None) -> Pass:
        """Return the bare loop of the tutorials, which copies loss and accuracy to the host in each step."""
        model, batches = self.model().train(), self.batches
        optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, 0, DECAY, nesterov=True, fused=fused)
        criterion = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)

        def train() -> tuple[float, float]:
            loss_sum = right = 0.0
            for images, labels in batches:
                optimizer.zero_grad()
                with self.fmt.autocast(self.device):
                    logits = model(images)
                    loss = criterion(logits, labels)
                loss.backward()
                optimizer.step()
                loss_sum += loss.item()
                right += (logits.argmax(1) == labels).sum().item()
            return loss_sum, right

        return lambda: self.timed(train)

    def timm_style(self) -> Pass:
        """Return a loop of timm's ingredients: its optimizer, schedule, loss and meters, a look at the loss per log."""
        from timm.loss import LabelSmoothingCrossEntropy
        from timm.optim import create_optimizer_v2
        from timm.scheduler import CosineLRScheduler
        from timm.utils import AverageMeter

        model, batches = self.model().train(), self.batches
        optimizer = create_optimizer_v2(model, "sgd", lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
        schedule = CosineLRScheduler(optimizer, t_initial=10**6, t_in_epochs=False)
        criterion = LabelSmoothingCrossEntropy(SMOOTHING)
        log, updates = logging.getLogger("bench.timm"), 0

        def train() -> None:
            nonlocal updates
            losses, seconds, data_seconds = AverageMeter(), AverageMeter(), AverageMeter()
            before = time.perf_counter()
            for images, labels in batches:
                data_seconds.update(time.perf_counter() - before)
                with self.fmt.autocast(self.device):
                    loss = criterion(model(images), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                updates += 1
                seconds.update(time.perf_counter() - before)
                if updates % LOG_EVERY == 0:
                    losses.update(loss.item(), len(images))
                    rate = sum(group["lr"] for group in optimizer.param_groups) / len(optimizer.param_groups)
                    log.info("%d: %.3f lr %.3e %.3f s", updates, losses.avg, rate, seconds.avg)
                schedule.step_update(num_updates=updates, metric=losses.avg)
                before = time.perf_counter()

        return lambda: self.timed(train)

    def lightning(self) -> Pass:
        """Return Lightning's Trainer with TensorBoard, progress bar and two metrics; its start-up is not counted."""
        model, batches, skipped = self.model().train(), self.batches, min(3, self.case.steps // 2)
        folder = tempfile.mkdtemp(prefix="bench-lightning-")

        def run() -> float:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                module, clock, trainer = _lightning(self, model, skipped, folder)
                trainer.fit(module, DataLoader(batches, batch_size=None))
            return clock.seconds / (self.case.steps - skipped) * 1e6

        return run

    def cvtrain(self, given: bool = True) -> Pass:
        """Return cvtrain's own loop.

        Args:
            given: Whether the batches lie ready as they do for the others, or its loader makes them.
        """
        run = self.run()
        if given:
            run.loader = Given(self.raw)  # type: ignore[assignment]

        def train() -> float:
            run.display.begin(run)  # once in a run, and not in a step
            try:
                return self.timed(lambda: one_epoch(run))
            finally:
                run.display.end()

        return train

    def run(self) -> TrainRun:
        """Return a run as the command line builds it, logger and display included."""
        folder = Path(tempfile.mkdtemp(prefix="bench-step-"))
        (folder / "weights").mkdir()
        run = build_run(self.builder, self.sets, self.device, folder, StopRequest())
        run.tracker = self.builder.build("logger", folder=folder, purge_step=None)
        run.display = Progressing(Console(file=io.StringIO(), force_terminal=True))
        return run

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Given:
    """A loader whose batches lie ready."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches
        self.steps_per_epoch = len(batches)

    def train_batches(self, *_: object) -> Generator[Batch, None, None]:
        """Yield them."""
        yield from self._batches


def one_epoch(run: TrainRun) -> None:
    """Train an epoch, without the evaluation and the checkpoint behind it."""
    train_epoch(run, time.monotonic() - run.state.seconds)
    run.state.end_epoch(run.state.means())


def _lightning(bench: Bench, model: nn.Module, skipped: int, folder: str) -> tuple[Any, Any, Any]:
    import lightning
    from lightning.pytorch.loggers import TensorBoardLogger

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.criterion = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            logits = self.model(batch[0])
            loss: Tensor = self.criterion(logits, batch[1])
            self.log("train/loss", loss, prog_bar=True)
            self.log("train/acc", (logits.argmax(1) == batch[1]).float().mean(), prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), LR, MOMENTUM, 0, DECAY, nesterov=True)

    class Clock(lightning.Callback):
        seconds = 0.0

        def on_train_batch_start(self, *arguments: object) -> None:
            if arguments[-1] == skipped:
                bench._wait()
                self.seconds = time.perf_counter()

        def on_train_epoch_end(self, *_: object) -> None:
            bench._wait()
            self.seconds = time.perf_counter() - self.seconds

    clock = Clock()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="gpu" if bench.device.type == "cuda" else "cpu", devices=1,
        precision="bf16-mixed" if bench.fmt.precision == "bf16" else "32-true",
        logger=TensorBoardLogger(folder), log_every_n_steps=LOG_EVERY, callbacks=[clock],
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    return Module(), clock, trainer


Variants = dict[str, Callable[[], Pass]]


def variants(bench: Bench) -> Variants:
    """Return the loops that are compared in one format, the baseline first."""
    loops: Variants = {"textbook": bench.textbook}
    if not bench.fmt.compile:
        loops |= {
            "textbook, fused SGD": lambda: bench.textbook(fused=True),
            "timm-style": bench.timm_style,
            "Lightning": bench.lightning,
        }
    loops["cvtrain"] = bench.cvtrain
    if not bench.fmt.compile:
        loops["cvtrain and its loader"] = lambda: bench.cvtrain(given=False)
    return loops


def default_variants(case: Case, device: torch.device) -> Variants:
    """Return the textbook in float32 and cvtrain's default settings with precision=amp."""
    plain = Bench(case, FORMATS[0], device)
    amp = Bench(case, Format("amp", "amp", channels_last=True), device, "aug=weak")
    return {"textbook": plain.textbook, "cvtrain precision=amp": lambda: amp.cvtrain(given=False)}


def zoo_variants(case: Case, device: torch.device) -> Variants:
    """Return cvtrain in float32, as precision=amp chooses, and in bf16 whether that pays or not."""
    found = {}
    for name in ("fp32", "amp", "bf16"):
        bench = Bench(case, Format(name, name, channels_last=True), device)
        found[name] = bench.cvtrain
    return found


def cases(quick: bool) -> Iterator[tuple[str, Callable[[torch.device], Variants], int]]:
    """Yield a name, what makes its variants, and how many rounds it takes."""
    mlp, resnet = (replace(MLP, steps=100), replace(RESNET18, batch=32)) if quick else (MLP, RESNET18)
    for case, rounds in ((mlp, 3 if quick else 15), (resnet, 2 if quick else 5)):
        for fmt in FORMATS:
            if fmt.channels_last and not fmt.compile and case is mlp:
                continue  # it has no convolutions, and bf16 is no use to it
            if quick and fmt.compile and case is not mlp:
                continue
            yield f"{case.name}, {fmt.name}", lambda d, c=case, f=fmt: variants(Bench(c, f, d)), rounds
    yield f"{resnet.name}, defaults", lambda d: default_variants(resnet, d), rounds
    for case in ZOO[:: 3 if quick else 1]:
        yield case.name, lambda d, c=case: zoo_variants(c, d), 2 if quick else 5


def peak_memory(device: torch.device, loop: Callable[[], Pass]) -> float:
    """Return by how much making and running a loop raises the memory of this process above its data, in MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loop()()
        return (torch.cuda.max_memory_allocated() - start) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak of this process so far is forgotten
    start = _status("VmRSS")
    loop()()
    return (_status("VmHWM") - start) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def in_a_child(args: argparse.Namespace, name: str, variant: str) -> float:
    """Return the peak memory of one variant, measured in a process of its own, in MiB."""
    words = [
        sys.executable,
        __file__,
        "--device",
        args.device,
        "--threads",
        str(args.threads),
        "--child",
        name,
        variant,
    ]
    done = subprocess.run(
        words + (["--quick"] if args.quick else []), check=True, capture_output=True, text=True, timeout=1800
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measure all cases."""
    parsing = parser(str(__doc__).splitlines()[0])
    parsing.add_argument("--device", default="cpu", help="cpu or cuda")
    parsing.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parsing.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parsing.parse_args()
    torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    if args.child:
        found = next(make for name, make, _ in cases(args.quick) if name == args.child[0])(device)
        print(peak_memory(device, found[args.child[1]]))
        return
    for name, make, rounds in cases(args.quick):
        if args.only not in name:
            continue
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr)
        loops = make(device)
        names = list(loops)
        rows += rates(name, interleaved({key: loop() for key, loop in loops.items()}, rounds), "µs/step", names[0])
        if name.startswith("zoo") or "compile" in name or "MLP" in name:
            continue
        memory = {key: in_a_child(args, name, key) for key in names}
        rows += [Row(name, key, value, "MiB", names[0], value / memory[names[0]]) for key, value in memory.items()]
    report(rows, args, [
        f"{args.device}, {args.threads} thread(s); batches in memory; cvtrain normalises its own in the step.",
        "ratio: time or memory over the baseline's, below 1 is better; memory: the peak above a process with its data.",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
