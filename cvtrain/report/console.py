"""The live display of a training run, and the tables at its end."""

from __future__ import annotations

import logging
import math
import os
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

log = logging.getLogger("cvtrain")

REFRESH_SECONDS = 0.25
DRAWING_SHARE = 0.01
"""Share of the time that drawing the bar may take: on a busy machine one drawing takes 20 ms."""


def make_console(json_output: bool) -> Console:
    """Return the console for people: standard output, or standard error when that belongs to JSON."""
    console = Console(stderr=json_output, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(stderr=json_output, highlight=False, soft_wrap=True, width=160)
    return console


class ConsoleHandler(logging.Handler):
    """Shows log lines above the live bar; notes dim, warnings yellow."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        self.console.print(record.getMessage(), style=style, markup=False)


def attach_log(console: Console) -> None:
    """Show the `cvtrain` logger on `console`, once, whatever Hydra does with the root logger."""
    logger = logging.getLogger("cvtrain")
    logger.setLevel(logging.INFO)
    for handler in [h for h in logger.handlers if isinstance(h, ConsoleHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(ConsoleHandler(console))


class Progressing:
    """Live bar with loss, accuracy, learning rate, images/s and the time left; one line an epoch stays.

    A step costs it a look at the clock. The bar is drawn a few times a second, here and not by a thread, whose drawing
    would hold the training up; its numbers are those that the loop has last read from the device.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task: Any = None
        self._draw_at = math.inf
        self._epoch_began = (0.0, 0)
        self._last_step = 0.0
        self._skipped = 0
        self._noticed = False

    def begin(self, run: Any) -> None:  # noqa: ANN401 - engine.TrainRun, a sibling's type
        """Start the bar."""
        heads = ("train loss", 10), ("acc", 7), ("val loss", 9), ("acc", 7), ("lr", 9), ("images/s", 9)
        self.console.print(f"{'epoch':>7} " + " ".join(f"{head:>{width}}" for head, width in heads), style="bold")
        self._skipped = getattr(run.precision, "skipped", 0)
        self._last_step = time.monotonic()
        self._epoch_began = (self._last_step, run.state.images)
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            *(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24)),
            *(TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn(compact=True), TextColumn("left")),
            console=self.console,
            transient=True,
            auto_refresh=False,
        )
        total = run.options.epochs * run.steps_per_epoch
        self._task = self._progress.add_task("warming up", total=total, completed=run.state.step)
        self._progress.start()
        self._draw_at = 0.0

    def step(self, run: Any) -> None:  # noqa: ANN401
        """Draw the bar when it is time."""
        self._last_step = now = time.monotonic()
        if now < self._draw_at or self._progress is None:
            return
        means = run.state.means(run.state.logged) if any(run.state.logged) else {}
        numbers = "  ".join(f"{name} {means[f'train/{name}']:.3f}" for name in ("loss", "acc") if means)
        text = (
            f"epoch {run.state.epoch + 1}/{run.options.epochs}  {numbers}{'  ' * bool(means)}"
            f"lr {run.optimizer.param_groups[-1]['lr']:.2e}  {self._rate(run):,.0f} images/s"
        )
        self._progress.update(self._task, completed=run.state.step, description=text)
        self._progress.refresh()
        self._draw_at = now + max(REFRESH_SECONDS, (time.monotonic() - now) / DRAWING_SHARE)

    def end_epoch(self, run: Any, row: dict[str, float], improved: bool) -> None:  # noqa: ANN401
        """Print the epoch's line, and once, behind the first epoch, what the run waits for."""
        mark = "[green]  best[/green]" if improved else ""
        total = getattr(run.precision, "skipped", 0)
        skipped, self._skipped = total - self._skipped, total
        if skipped:
            mark += f"[yellow]  {skipped} step{'s' * (skipped > 1)} skipped (fp16 overflow)[/yellow]"
        self.console.print(
            f"{run.state.epoch:>3}/{run.options.epochs:<3} {row['train/loss']:>10.4f} {row['train/acc']:>7.4f}"
            f" {row['val/loss']:>9.4f} {row['val/acc']:>7.4f} {row['lr']:>9.2e} {self._rate(run):>9,.0f}{mark}"
        )
        if not self._noticed:
            self._noticed = True
            notice = data_bound_notice(run.state.waited / max(1e-9, self._last_step - self._epoch_began[0]), run.loader)
            if notice:
                log.warning(notice)
        self._epoch_began = (time.monotonic(), run.state.images)

    def _rate(self, run: Any) -> float:  # noqa: ANN401
        began, images = self._epoch_began
        return float(run.state.images - images) / max(1e-9, self._last_step - began)

    def end(self) -> None:
        """Take the bar away."""
        self._draw_at = math.inf
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


WAITING = 0.3
"""Share of the training time spent waiting for data, from which the run says so."""


def data_bound_notice(wait_share: float, loader: Any) -> str | None:  # noqa: ANN401 - data.Loader, or another
    """Return a sentence with the fix when a run waits for data more than 30 % of its time, else None.

    Args:
        wait_share: Time in which no batch was there, by the time of the epoch's steps, 0..1.
        loader: Tells its `mode` and `config`, where it has them.
    """
    if wait_share <= WAITING:
        return None
    config, mode = getattr(loader, "config", None), getattr(loader, "mode", "host")
    workers, cores = getattr(config, "workers", 0), usable_cores()
    in_memory = hasattr(getattr(getattr(loader, "sets", None), "train", None), "nbytes")
    fixes = []
    if mode == "host" and in_memory:
        fixes.append("loader=device holds the pictures in memory and needs no workers")
    if mode == "host" and not in_memory:
        fixes.append("data.cache=disk decodes each picture once")
    if mode == "host" and workers < cores:
        fixes.append(f"workers={cores} uses all cores")
    fixes.append("a smaller img_size reads less")
    return f"data-bound: {100 * wait_share:.0f} % of the training time is spent waiting for data; {', '.join(fixes)}."


def usable_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


HISTOGRAM_CLASSES = 20
"""Classes that the histogram shows: of more, the largest and the smallest."""
IMBALANCE = 10
"""How many times the largest class may be the smallest before the run says so."""


def class_histogram(names: Sequence[str], counts: Sequence[int]) -> Columns:
    """Return how many training pictures each class has, the largest first, as many side by side as fit.

    Args:
        names: K class names.
        counts: K counts.
    """
    order = sorted(range(len(names)), key=lambda k: (-counts[k], k))
    half = HISTOGRAM_CLASSES // 2
    shown = order if len(order) <= HISTOGRAM_CLASSES else [*order[:half], *order[-half:]]
    width = max(len(names[k][:24]) for k in shown)
    digits = max(len(f"{counts[k]:,}") for k in shown)
    cells = []
    for k in shown:
        bar = "█" * max(int(counts[k] > 0), round(8 * counts[k] / max(1, *counts)))
        cells.append(escape(f"{names[k][:24]:<{width}} {bar:<8} {counts[k]:>{digits},}"))
    if len(shown) < len(order):
        cells.insert(half, f"… and {len(order) - len(shown)} more …")
    return Columns(cells, padding=(0, 3), equal=True, title="Training pictures by class")


def imbalance_notice(names: Sequence[str], counts: Sequence[int], multilabel: bool) -> str | None:
    """Return a sentence when the largest class has more than 10 times the pictures of the smallest, else None.

    Args:
        names: K class names.
        counts: K counts.
        multilabel: Whether a picture may have several labels; then no sampler can balance them.
    """
    most, least = (counts.index(extreme(counts)) for extreme in (max, min))
    if counts[most] <= IMBALANCE * counts[least]:
        return None
    remedy = "class_weights=balanced gives rare classes more weight"
    if not multilabel:
        remedy = f"sampler=balanced shows rare classes more often, {remedy}"
    return (
        f"imbalance: {counts[most]:,} training pictures of {names[most]}, {counts[least]:,} of {names[least]}; "
        f"{remedy}. per_class.csv will have the recall of each."
    )


def stages_table(
    stages: Sequence[Any], phases: Sequence[Any], sizes: Mapping[str, int], base_lr: float, epochs: int
) -> Table:
    """Return the parts of the model with their parameters and base learning rate, a column for each phase.

    Args:
        stages: core.Stage, from input to output.
        phases: finetune.Phase, in order.
        sizes: Numbers in each parameter, by name.
        base_lr: The optimizer's, which a phase may replace by its own.
        epochs: Of the run.
    """
    table = Table(title="Stages of the model", title_justify="left", title_style="bold", header_style="bold")
    table.add_column("stage")
    table.add_column("modules", overflow="ellipsis", no_wrap=True, max_width=48)
    table.add_column("parameters", justify="right")
    for i, phase in enumerate(phases):
        end = phases[i + 1].first if i + 1 < len(phases) else epochs
        shown = f"epochs {phase.first + 1}–{end}" if end > phase.first + 1 else f"epoch {end}"
        table.add_column("lr" if len(phases) == 1 else f"lr, {shown}", justify="right")
    counts = [sum(sizes[name] for name in stage.parameters) for stage in stages]
    for k, (stage, count) in enumerate(zip(stages, counts, strict=True)):
        rates = [(base_lr if phase.lr is None else phase.lr) * phase.factors[k] for phase in phases]
        modules = ", ".join(stage.modules if len(stage.modules) <= 3 else [stage.modules[0], "…", stage.modules[-1]])
        row = [escape(modules), f"{count:,}", *(f"{rate:.3g}" if rate else "frozen" for rate in rates)]
        table.add_row(stage.name, *row)
    trained = [sum(n for n, factor in zip(counts, p.factors, strict=True) if factor) for p in phases]
    table.add_section()
    table.add_row("total", "", f"{sum(counts):,}", *(f"{count:,} train" for count in trained))
    return table


def artifacts_table(rows: Sequence[Any], pictures: str, threads: int, winner: str | None = None) -> Table:
    """Return the proof as a table that fits a window of 100 columns.

    Args:
        rows: evaluation.ProofRow, the reference first.
        pictures: What they were judged on: "359 test pictures".
        threads: CPU threads that each had.
        winner: Artifact to mark; None: none.
    """
    batch = rows[0].batch
    table = _table(
        f"Artifacts, each run by its own runtime on {pictures}, {threads} CPU thread{'s' * (threads > 1)}; ★ the winner"
    )
    for name in ("artifact", "runtime"):
        table.add_column(name, overflow="fold")
    heads = ("acc\n%", "Δ to fp32 [95 %]\npoints", "agree\n%", "size", "batch 1\nms", f"batch {batch}\nimages/s")
    for name in (*heads, "mem\nMB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        delta = "–"
        if row is not rows[0]:
            delta = f"{100 * row.delta:+.2f} [{100 * row.delta_low:+.2f}, {100 * row.delta_high:+.2f}]"
        table.add_row(
            f"{'★ ' * (row.artifact == winner)}{escape(row.artifact)}", row.runtime, f"{100 * row.accuracy:.2f}", delta,
            _agreement(row.agreement), human_bytes(row.bytes), short_ms(row.latency_ms_p50),
            f"{1000 * row.batch / row.latency_batch_ms_p50:,.0f}", _megabytes(row.memory_mb),
            style="bold green" if row.artifact == winner else None,
        )  # fmt: skip
    table.caption = escape("\n".join(f"{row.artifact}: {row.note}" for row in rows if row.note))
    return table


def latency_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Return a benchmark as a table; `rows` are those of benchmark.csv, sorted by batch."""
    table = _table(title)
    for name in ("artifact", "runtime"):
        table.add_column(name, overflow="fold")
    for name in ("batch", "p50, ms", "p95, ms", "IQR, ms", "images/s", "memory, MB", "size", "speed"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        if i and row["batch"] != rows[i - 1]["batch"]:
            table.add_section()
        table.add_row(
            *(escape(row["artifact"]), row["runtime"], str(row["batch"])),
            *(short_ms(row[name]) for name in ("latency_ms_p50", "latency_ms_p95", "latency_ms_iqr")),
            f"{row['images_per_s']:,.0f}",
            *(_megabytes(row["memory_mb"]), human_bytes(row["bytes"]), f"{row['speed']:.2f}×"),
        )
    return table


def _table(title: str) -> Table:
    return Table(
        title=escape(title),
        title_justify="left",
        title_style="bold",
        header_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1),
        collapse_padding=True,
    )


def _agreement(share: float) -> str:
    """Return a share in percent; 100 only where it is all."""
    return "100" if share == 1 else f"{min(99.99, 100 * share):.2f}"


def _megabytes(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def short_ms(value: float) -> str:
    """Return a number of milliseconds with about three digits: 0.052, 0.52, 7.31, 52.4, 1,234."""
    return f"{value:,.{3 if value < 0.1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def human_bytes(size: int) -> str:
    """Return a size in decimal units: 12.3 kB, 45.6 MB."""
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def sweep_table(jobs: Sequence[dict[str, Any]]) -> Table:
    """Return one row for each job of a multirun; below them, mean ± std over seeds and folds."""
    table = Table(title="Jobs", title_justify="left", title_style="bold", header_style="bold")
    table.add_column("#", justify="right")
    table.add_column("job")
    for name in ("status", "val/acc", "test/acc", "seconds"):
        table.add_column(name, justify="right")
    common = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    for i, job in enumerate(jobs):
        metrics = job.get("metrics", {})
        good = job["exit_code"] == 0
        table.add_row(
            str(i),
            escape(",".join(part for part in job["overrides"] if part not in common) or job["name"]),
            "[green]done[/green]" if good else f"[red]failed ({job['exit_code']})[/red]",
            *(f"{metrics[key]:.4f}" if key in metrics else "–" for key in ("val/acc", "test/acc")),
            f"{job['seconds']:.1f}" if job.get("seconds") is not None else "skipped",
        )
    table.caption = escape("\n".join(_over_seeds(jobs, common)))
    table.caption_justify = "left"
    return table


_REPEATS = ("seed=", "data.split_seed=", "data.fold=")


def _over_seeds(jobs: Sequence[dict[str, Any]], common: Collection[str]) -> list[str]:
    groups: dict[str, list[float]] = {}
    for job in jobs:
        if "test/acc" in job.get("metrics", {}):
            parts = [part for part in job["overrides"] if part not in common and not part.startswith(_REPEATS)]
            groups.setdefault(",".join(parts) or "all", []).append(100 * job["metrics"]["test/acc"])
    return [
        f"{name}: test accuracy {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} % "
        f"(mean ± std of {len(values)}; {min(values):.2f} to {max(values):.2f})"
        for name, values in groups.items()
        if len(values) > 1
    ]
