#!/usr/bin/env python3
"""What compression and export gain and cost, as the command line tells it: artifacts of real runs, and of bare models.

Cases `NAME at 224` are `cvtrain benchmark model=NAME`: networks with random weights at 224 px, whose speed and size are
those of trained ones. Cases `fashion NAME` train NAME on Fashion-MNIST at 32 px (Debian dataset-fashion-mnist, MIT) and
compress it, cases `emoji NAME` on colour emoji at 64 px by their 9 categories (npm emoji-datasource-google, Apache-2.0,
see transfer.py); accuracy is that of the whole test split. Every latency of a case is measured in turns in one process
each; ratios are of medians of the same command. Rows `ms` with a ratio below 1 are faster, rows `MB` smaller, rows
`points` have the difference of the accuracies as their value. The trained cases but the first are about accuracy and
give no latency, so they need no quiet machine (`--only fashion`, `--only emoji`). All takes about two hours.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Row, parser, report
from transfer import emoji
from transfer import weights as lite0

Found = dict[str, dict[str, Any]]
"""Rows of a table by the artifact's name."""

BARE = ("resnet18", "mobilenet_v3_small", "mobilenet_v2", "efficientnet_b0", "convnext_tiny", "vgg16")
NOT_PRUNED = ("mobilenet_v3_small",)
"""Measured for INT8 only."""
FASHION = [
    *("data=fashion_mnist", "data.root=/usr/share/datasets/fashion-mnist", "img_size=32", "data.limit=12000"),
    *("aug=weak", "batch_size=128", "precision=amp"),
]
EMOJI = ["data=folder", "img_size=64", "aug=weak", "batch_size=32", "precision=amp"]
STRIDED = "model.small_stem=false"
"""The network as it is for large pictures: a tenth of the arithmetic at 32 px."""
ADAMW = ["optimizer=adamw", "scheduler=onecycle"]
PRUNE = "compression.prune_structured."


@dataclass(frozen=True)
class Training:
    """One run: words of the command line, and what is made of the model.

    Attributes:
        words: Options of the training.
        epochs: Of the training, and of the fine-tuning behind pruning, which takes the training's rate again (learning
            rate rewinding: Renda, Frankle & Carbin, "Comparing rewinding and fine-tuning in neural network pruning",
            ICLR 2020).
        compression: Steps of the first command.
        again: Steps of `cvtrain compress` on the finished run; None: no second command.
        timed: Whether its latencies are reported.
    """

    words: Sequence[str]
    epochs: int
    compression: str
    again: str | None = None
    timed: bool = False


TRAININGS = {
    "fashion resnet18": Training(
        [*FASHION, *ADAMW, "optimizer.lr=2e-3", "model=resnet18", STRIDED],
        8,
        "[ptq_static,prune_structured]",
        again="[prune_structured,ptq_static]",
        timed=True,
    ),
    "fashion mobilenet_v2": Training(
        [*FASHION, *ADAMW, "optimizer.lr=2e-3", "model=mobilenet_v2", STRIDED],
        8,
        "[ptq_static,qat,prune_structured]",
    ),
    "fashion efficientnet_b0": Training(
        [*FASHION, *ADAMW, "optimizer.lr=2e-3", "model=efficientnet_b0", STRIDED],
        8,
        "[ptq_static,qat,prune_structured]",
    ),
    "fashion convnext_tiny": Training(
        [*FASHION, *ADAMW, "optimizer.lr=5e-4", "model=convnext_tiny", STRIDED],
        6,
        "[ptq_static,prune_structured]",
    ),
    "fashion vgg16": Training(
        [*FASHION, *ADAMW, "optimizer.lr=2e-4", "model=vgg16"], 4, "[ptq_static,prune_structured]"
    ),
    "emoji efficientnet-lite0": Training(
        [
            *(*EMOJI, *ADAMW, "optimizer.lr=5e-4", "model=timm"),
            *("model.name=tf_efficientnet_lite0", "model.small_stem=false"),
        ],
        6,
        "[ptq_static,qat,prune_structured]",
    ),
}
QUICK = ("resnet18 at 224", "fashion resnet18")


class Campaign:
    """Runs the command line.

    Args:
        outputs: Where the run folders go.
        quick: Few steps, few timed calls.
        threads: CPU threads of every command; None: what torch chooses.
    """

    def __init__(self, outputs: Path, quick: bool, threads: int | None) -> None:
        self.outputs, self.quick, self.threads = outputs, quick, threads
        self.notes: list[str] = []

    def told(self, *words: str) -> dict[str, Any]:
        """Run one command and return its last line; what it said of its artifacts becomes a note."""
        command = [sys.executable, "-m", "cvtrain", *words, "json=true"]
        command += [f"output_dir={self.outputs}"] if words[0] != "compress" else []  # which writes into the run's own
        command += [f"threads={self.threads}"] if self.threads else []
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"artifacts: {' '.join(command)} ended with {done.returncode}\n{done.stderr}")
        said = ("winner: ", "no artifact fits")
        self.notes += [
            f"{' '.join(words[:3])}: {line.strip()}"
            for line in done.stderr.splitlines()
            if line.startswith(said) or " slower than " in line or " hardly faster than " in line
        ]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def bare(self, name: str) -> list[Row]:
        """Measure a network with random weights, its exports, INT8 files and half of it."""
        steps = "[ptq_static]" if name in NOT_PRUNED else "[ptq_static,prune_structured]"
        told = self.told(
            *("benchmark", f"model={name}", "img_size=224", f"compression={steps}", "export=[onnx]"),
            *(f"batches={'[1]' if self.quick else '[1,8]'}", f"runs={5 if self.quick else 60}"),
        )
        rows: list[Row] = []
        for batch in sorted({row["batch"] for row in told["rows"]}):
            found = {row["artifact"]: row for row in told["rows"] if row["batch"] == batch}
            case = f"{name} at 224, batch {batch}"
            rows += compared(case, found, "ms", lambda row: float(row["latency_ms_p50"]))
            if batch == 1:
                rows += compared(case, found, "MB", lambda row: row["bytes"] / 1e6)
        return rows

    def trained(self, case: str, training: Training) -> list[Row]:
        """Train, compress and prove, in one command or two."""
        prune = [f"{PRUNE}finetune_epochs={training.epochs}", f"{PRUNE}finetune_lr=1", f"{PRUNE}distill=true"]
        words = [*training.words, f"epochs={training.epochs}", f"compression={training.compression}", "export=[onnx]"]
        words += [*prune, "logger=none"]
        if case.startswith("emoji"):
            words += [f"data.root={emoji()}", f"pretrained={lite0()}"]
        if self.quick:
            words += ["epochs=1", "limit_train_batches=2", "limit_eval_batches=2"]
        told = self.told("train", *words)
        rows = self.proved(case, told["artifacts"], training.timed)
        if training.again is not None:
            more = self.told("compress", f"run={told['run']}", f"compression={training.again}", *prune)
            rows += self.proved(f"{case}, pruned + distilled + INT8", more["artifacts"], training.timed)
        return rows

    def proved(self, case: str, table: Sequence[dict[str, Any]], timed: bool) -> list[Row]:
        """Return accuracy, latency if `timed`, size and arithmetic of each artifact of a table."""
        found = {row["artifact"]: row for row in table}
        dense = table[0]
        rows = [Row(case, "fp32", 100 * dense["accuracy"], "%", "fp32", 1.0)]
        rows += [
            Row(case, name, 100 * row["delta"], "points", "fp32", row["accuracy"] / (dense["accuracy"] or 1.0))
            for name, row in list(found.items())[1:]
        ]
        rows += compared(case, found, "ms", lambda row: float(row["latency_ms_p50"])) if timed else []
        rows += compared(case, found, "MB", lambda row: row["bytes"] / 1e6)
        pruned = [name for name in found if name == "pruned"]
        return rows + [
            Row(case, name, found[name]["macs"] / 1e6, "M MACs", "fp32", found[name]["macs"] / dense["macs"])
            for name in pruned
        ]


def compared(case: str, found: Found, unit: str, value: Callable[[dict[str, Any]], float]) -> list[Row]:
    """Return a row an artifact against PyTorch's, and against the float file of the same runtime where there is one."""
    values = {name: value(row) for name, row in found.items()}
    first = next(iter(values))
    rows = [Row(case, name, number, unit, first, number / values[first]) for name, number in values.items()]
    for name, number in values.items():
        base = "onnx" if found[name]["runtime"] == "onnxruntime" else first
        if base in values and base not in (name, first):
            rows.append(Row(case, name, number, unit, base, number / values[base]))
    return rows


def main() -> None:
    """Run the cases and report."""
    parsing = parser(str(__doc__).splitlines()[0])
    parsing.add_argument("--threads", type=int, help="CPU threads of every command; without it what torch chooses")
    args = parsing.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        campaign = Campaign(Path(temporary), args.quick, args.threads)
        work: dict[str, Callable[[], list[Row]]] = {f"{name} at 224": lambda n=name: campaign.bare(n) for name in BARE}
        work |= {case: lambda c=case, t=training: campaign.trained(c, t) for case, training in TRAININGS.items()}
        for case, run in work.items():
            if args.only in case and (args.only or not args.quick or case in QUICK):
                found = run()
                rows += found
                print(f"{case}: {len(found)} rows", file=sys.stderr)
        report(rows, args, [*campaign.notes, f"CPU threads: {args.threads or 'as many as torch takes'}"])


if __name__ == "__main__":
    main()
