"""What the benchmarks share: interleaved timing, memory of a process and its children, the report."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Row:
    """One figure; `ratio` is value over the baseline's value in the same rounds, above 1 meaning more."""

    case: str
    variant: str
    value: float
    unit: str
    baseline: str
    ratio: float


def arguments(description: str) -> argparse.Namespace:
    """Return the command line of every benchmark: `--quick`, `--json FILE` and `--only TEXT`."""
    return parser(description).parse_args()


def parser(description: str) -> argparse.ArgumentParser:
    """Return what reads that command line, for a benchmark that adds to it."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="small and rough, to see that it works")
    made.add_argument("--json", type=Path, help="write the rows, the hardware and the versions to this file")
    made.add_argument("--only", default="", help="run only the cases whose name contains this")
    return made


def interleaved(passes: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every pass once a round, in turn, so that a slow moment of the machine hits all; one round is thrown away."""
    found: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name, run in passes.items():
            value = run()
            if number:
                found[name].append(value)
    return found


def rates(case: str, found: dict[str, list[float]], unit: str, baseline: str) -> list[Row]:
    """Return a row a variant: the median, and the median of the ratios to the baseline round by round."""
    base = found[baseline]
    return [
        Row(case, name, median(values), unit, baseline, median(v / b for v, b in zip(values, base, strict=True)))
        for name, values in found.items()
    ]


def peak_memory(run: Callable[[], object]) -> float:
    """Return by how much `run` raises the memory of a process that is forked for it, its children included, in MiB.

    Counted is the proportional set size: a page that processes share is split among them.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        start = peak = _proportional()
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.02):
                peak = max(peak, _proportional())

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            run()
        finally:
            done.set()
            watching.join()
            os.write(writing, str((peak - start) / 1024).encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return float(text)


def _proportional() -> int:
    """Return the proportional set size of this process and all below it, in KiB."""
    total, pending = 0, [os.getpid()]
    while pending:
        pid = pending.pop()
        with contextlib.suppress(OSError, ValueError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            for task in Path(f"/proc/{pid}/task").iterdir():
                pending += [int(below) for below in (task / "children").read_text().split()]
    return total


def timed(batches: Iterator[int]) -> float:
    """Return samples a second over `batches` (their sizes), from the end of the first one on."""
    next(batches)
    start, count = time.perf_counter(), 0
    for size in batches:
        count += size
    return count / (time.perf_counter() - start)


def report(rows: Sequence[Row], args: argparse.Namespace, notes: Sequence[str] = ()) -> None:
    """Print the rows as a table, and write them with the hardware and the versions where asked."""
    print(f"{'case':<36}{'variant':<26}{'value':>12} {'unit':<12}{'ratio':>8}  baseline")
    for row in rows:
        print(f"{row.case:<36}{row.variant:<26}{row.value:>12,.1f} {row.unit:<12}{row.ratio:>8.2f}  {row.baseline}")
    for note in notes:
        print(note)
    if args.json:
        content = {
            "hardware": hardware(),
            "versions": versions(),
            "quick": args.quick,
            "notes": list(notes),
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n")


def hardware() -> dict[str, object]:
    """Return the processor, the cores and the load at the end."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "load_1min_at_end": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """Return the versions of what was measured."""
    names = ["cvtrain", "torch", "torchvision", "numpy", "pillow"]
    names += [name for name in ("timm", "lightning") if name in sys.modules]
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text().splitlines()
    return []
