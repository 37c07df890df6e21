#!/usr/bin/env python3
"""On one NVIDIA GPU: ResNet-50's formats against textbook and timm, the device loader against workers, the artifacts.

Called by gpu.sh, which also runs step.py there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from common import Row, arguments, interleaved, rates, report, timed
from epoch import Data, Samples, read_data
from step import Bench, Case, Format, Pass, peak_memory
from torch.utils.data import DataLoader

from cvtrain.data import Loader, LoaderConfig

WORKERS = 16
PLAIN, LOW = Format("fp32"), Format("bf16", "bf16", channels_last=True)


def resnet50(quick: bool, device: torch.device) -> list[Row]:
    """Return pictures a second and peak memory of ResNet-50 at 224."""
    case = Case("ResNet-50 224x224", ("model=resnet50", "img_size=224"), 3, 224, 32 if quick else 128, 5)
    plain, low = Bench(case, PLAIN, device), Bench(case, LOW, device)
    loops = {
        "textbook fp32": (plain.textbook, False),
        "textbook tf32": (plain.textbook, True),
        "timm-style bf16": (low.timm_style, True),
        "cvtrain fp32": (_ours(case, "fp32", device), False),
        "cvtrain tf32": (_ours(case, "tf32", device), True),
        "cvtrain amp": (_ours(case, "amp", device), True),
    }
    memory, passes = {}, {}
    for name, (loop, tf32) in loops.items():
        memory[name] = peak_memory(device, lambda loop=loop, tf32=tf32: with_tf32(loop(), tf32))
        passes[name] = with_tf32(loop(), tf32)
    found = interleaved(passes, 2 if quick else 9)
    speeds = {name: [case.batch * 1e6 / value for value in values] for name, values in found.items()}
    base = memory["textbook fp32"]
    return rates(case.name, speeds, "pictures/s", "textbook fp32") + [
        Row(case.name, name, value, "MiB", "textbook fp32", value / base) for name, value in memory.items()
    ]


def _ours(case: Case, precision: str, device: torch.device) -> Callable[[], Pass]:
    return Bench(case, Format(precision, precision, channels_last=True), device).cvtrain


def with_tf32(train: Pass, allowed: bool) -> Pass:
    """Return `train` under its own setting of TensorFloat-32, which is one for the whole process."""

    def run() -> float:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
        return train()

    return run


def loaders(quick: bool, device: torch.device, data: Data) -> list[Row]:
    """Return pictures a second onto the device, shifted, flipped and normalised: its own loader and 16 workers."""
    batch, count = 256, 20 if quick else 160
    run = Bench(Case("loader", ("model=simple_cnn",), data.channels, 32, batch, 1), LOW, device, "aug=weak").run()
    config = LoaderConfig(batch_size=batch, seed=0, device=device, mode="device")
    loader, epochs = Loader(data.sets(), config), iter(range(10**9))
    made = DataLoader(Samples(data), batch, shuffle=True, num_workers=WORKERS, pin_memory=True, drop_last=True)

    def textbook() -> Iterator[int]:
        for images, labels in islice(made, count + 1):
            yield len(images.to(device, non_blocking=True)) * (labels.to(device, non_blocking=True).ndim)
        torch.cuda.synchronize()

    def ours() -> Iterator[int]:
        epoch = next(epochs)
        for item in islice(loader.train_batches(epoch), count + 1):
            yield len(run.train_images(item, epoch))
        torch.cuda.synchronize()

    passes = {f"textbook, {WORKERS} workers": lambda: timed(textbook()), "cvtrain device": lambda: timed(ours())}
    return rates(f"loader, {data.name}", interleaved(passes, 2 if quick else 5), "pictures/s", next(iter(passes)))


def artifacts(quick: bool) -> list[Row]:
    """Return each artifact's latency on one picture, as the run itself proves it."""
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        words = ["model=resnet18", "precision=amp", "device=cuda", f"epochs={1 if quick else 10}", "json=true"]
        command = [sys.executable, "-m", "cvtrain", *words, f"output_dir={folder}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])["artifacts"]
    base = found[0]["latency_ms_p50"]
    return [
        Row("artifacts", f"{a['artifact']} ({a['runtime']})", 1000 * a["latency_ms_p50"], "µs/picture",
            found[0]["artifact"], a["latency_ms_p50"] / base)
        for a in found
    ]  # fmt: skip


def main() -> None:
    """Measure all of it."""
    args = arguments(str(__doc__).splitlines()[0])
    if not torch.cuda.is_available():
        sys.exit("gpu.py: torch finds no CUDA device here; this benchmark needs one NVIDIA GPU.")
    device, rows = torch.device("cuda", 0), []
    if args.only in "ResNet-50":
        rows += resnet50(args.quick, device)
    if args.only in "loader":
        rows += loaders(args.quick, device, read_data("/usr/share/datasets/fashion-mnist"))
    if args.only in "artifacts":
        rows += artifacts(args.quick)
    report(rows, args, [f"{torch.cuda.get_device_name(device)}; ratio: to the named baseline."])


if __name__ == "__main__":
    main()
