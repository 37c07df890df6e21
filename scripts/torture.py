"""Kill training runs at random moments, let them go on, and hold what they end with against uninterrupted ones.

`scripts/torture.py --kills 200 --seed 0 --json FILE` kills; `--mutate` spoils each field of a checkpoint, `--flips 400`
single bits of one. Exit code 1 when anything was lost, differs, or went unnoticed. A case and a run of a case have
seeds of their own: `--case NAME --seed S` repeats what the whole campaign did to it, but for the machine's timing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}

import torch
from bench.common import hardware, versions
from torture_damage import flips, mutations
from torture_lives import (  # fmt: skip
    LIFE_LIMIT_S,
    ORPHAN_LIMIT_S,
    QUICK,
    Board,
    Command,
    Orphans,
    begin,
    compare,
    ended,
    finish,
    saved_step,
    tail,
)


@dataclass(frozen=True)
class Case:
    """A kind of run.

    Attributes:
        overrides: Besides QUICK.
        later: Overrides of the lives that go on, in turn; none means the same as the first.
        aims: What the kills are aimed at: a phase, or any `moment` of the whole life.
    """

    name: str
    overrides: tuple[str, ...]
    later: tuple[str, ...] = ()
    aims: tuple[str, ...] = ("moment", "save", "save")


HOST = ("loader=host",)
CASES = (
    Case("device", ("loader=device", "scheduler=cosine")),
    Case("host, 0 workers", (*HOST, "workers=0")),
    Case("host, 2 workers", (*HOST, "workers=2", "scheduler=cosine")),
    Case("host, 0 and 2 workers in turn", (*HOST, "workers=0"), ("workers=2", "workers=0")),
    Case("accumulation", ("grad_accum_steps=3", "clip_grad_norm=1.0", "save_every_steps=1")),
    Case("mixup", ("aug=mixup", "optimizer=adamw", "optimizer.lr=0.002", "scheduler=cosine")),
    Case("ema", ("averaging=ema", "scheduler=cosine", "save_every_steps=3")),
    Case("swa", ("averaging=swa", "averaging.start=0.3", "optimizer=adamw", "optimizer.lr=0.002")),
    Case("plateau", ("scheduler=plateau", "scheduler.plateau_epochs=0", "min_delta=0.3", "optimizer=adamw",
                     "optimizer.lr=0.002", "epochs=4")),
    Case("stochastic depth", ("regularizer=stochastic_depth", "model=resnet18", "limit_train_batches=4",
                              "save_every_steps=1")),
    Case("evaluation", ("loader=device", "save_every_steps=5"), aims=("evaluate",)),
    Case("after the final checkpoint", ("export=safetensors", "logger=tensorboard", "plots=true", "report=true",
                                        "epochs=2"), aims=("conclude",)),
)  # fmt: skip
PROCESS = Case("python -m cvtrain", ("loader=host", "workers=2", "aug=mixup", "averaging=ema", "save_every_steps=1"))


@dataclass
class Tally:
    """What a case has come to."""

    kills: int = 0
    inside: int = 0
    lost: int = 0
    finished: int = 0
    bits: int = 0
    orphan_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


def kill_once(
    child: int, board: Board, aim: str, chance: random.Random, life: float, orphans: Orphans
) -> tuple[bool, int | None]:
    """Kill a life at its aim; return whether it was killed, and otherwise how it ended before."""
    start, number = time.monotonic(), chance.randint(1, 3)
    wait = chance.uniform(0.0, life) if aim == "moment" else 0.0
    within = chance.random()
    while True:
        now = time.monotonic() - start
        if now > LIFE_LIMIT_S or (
            now >= wait if aim == "moment" else board.begun(aim) >= (number, 1)[aim == "conclude"]
        ):
            break
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return False, os.waitstatus_to_exitcode(status)
        if int(now * 1e4) % 500 == 0:
            orphans.poll(child)
        time.sleep(0.0001)
    if aim != "moment":
        time.sleep(within * 1.2 * max(0.001, board.mean(aim), 0.3 * life if aim == "conclude" else 0.0))
    os.kill(child, signal.SIGKILL)
    code = ended(child)
    return code == -signal.SIGKILL, code


def kill_case(case: Case, kills: int, seed: int, place: Path) -> Tally:
    """Kill `kills` times, spread over as many runs as it takes; let each run finish and compare it."""
    tally, orphans = Tally(), Orphans()
    commands = [Command.parse((*case.overrides, *later)) for later in ((x,) if x else () for x in ("", *case.later))]
    whole = place / "whole"
    started = time.monotonic()
    if (code := finish(commands[0], whole)) != 0:
        tally.wrong.append(f"the uninterrupted run ended with {code}: {tail(whole)}")
        return tally
    life, runs = time.monotonic() - started, 0
    while tally.kills < kills:
        chance = random.Random(f"{seed}/{case.name}/{runs}")
        folder, lives = place / f"run{runs}", 0
        runs += 1
        for _ in range(min(chance.randint(1, 6), kills - tally.kills)):
            before, board = saved_step(folder), Board()
            child = begin(commands[lives % len(commands)], folder, board.watch)
            lives += 1
            killed, code = kill_once(child, board, chance.choice(case.aims), chance, life, orphans)
            orphans.poll()
            if not killed:
                if code:
                    tally.wrong.append(f"run {runs - 1} ended with {code}: {tail(folder)}")
                break
            tally.kills += 1
            tally.inside += board.begun("save") > board.ended("save")
            after = saved_step(folder)
            tally.lost += after < before or (after == -1 and board.ended("save") > 0)
        code = finish(commands[lives % len(commands)], folder, orphans)
        if code != 0:
            tally.wrong.append(f"run {runs - 1} ended with {'a hang' if code is None else code}: {tail(folder)}")
            continue
        judge(tally, case.name, whole, folder)
    orphans.settle()
    tally.orphan_s = orphans.slowest
    if orphans.slowest > ORPHAN_LIMIT_S:
        tally.wrong.append(f"a data worker lived on for {orphans.slowest:.1f} s")
    return tally


def judge(tally: Tally, name: str, whole: Path, folder: Path) -> None:
    """Compare a finished run with the uninterrupted one."""
    tally.finished += 1
    difference = compare(whole, folder)
    tally.bits += difference.bits
    left = [str(path) for path in folder.rglob(".*.tmp-*")]
    if difference.what or left:
        tally.wrong.append(f"{name}, {folder}: {'; '.join([*difference.what[:8], *left])}")


def kill_processes(case: Case, kills: int, seed: int, place: Path) -> Tally:
    """The same through the command line, each life a process of its own."""
    tally, orphans, runs = Tally(), Orphans(), 0
    whole = process(case, place, "whole").wait(LIFE_LIMIT_S), only_run(place / "whole")
    while tally.kills < kills:
        chance = random.Random(f"{seed}/{case.name}/{runs}")
        name = f"run{runs}"
        runs += 1
        for _ in range(min(chance.randint(2, 4), kills - tally.kills)):
            started, alive = process(case, place, name), time.monotonic()
            number, seen = chance.randint(1, 12), 0
            while started.poll() is None and time.monotonic() - alive < LIFE_LIMIT_S and seen < number:
                seen += bool(writing(place / name))
                time.sleep(0.0002)
            time.sleep(chance.uniform(0.0, 0.05) * chance.randint(0, 1))
            started.kill()
            tally.inside += bool(writing(place / name))
            if started.wait() != -signal.SIGKILL:
                break
            tally.kills += 1
            folder = only_run(place / name)
            tally.lost += folder is not None and saved_step(folder) == -2
            orphans.poll()
        code = ended(process(case, place, name).pid, orphans=orphans)
        folder = only_run(place / name)
        if code != 0 or whole[0] != 0 or folder is None or whole[1] is None:
            tally.wrong.append(f"{name} ended with {code}: {tail(place / name)}")
            break
        judge(tally, case.name, whole[1], folder)
    orphans.settle()
    tally.orphan_s = orphans.slowest
    return tally


def process(case: Case, place: Path, name: str) -> subprocess.Popen[bytes]:
    """Start `python -m cvtrain … resume=auto`."""
    argv = [sys.executable, "-m", "cvtrain", *QUICK, *case.overrides, f"output_dir={place / name}", "resume=auto"]
    with (place / f"{name}.log").open("ab") as log:
        return subprocess.Popen(argv, cwd=place, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def only_run(folder: Path) -> Path | None:
    """Return the run below an output folder, None before there is one."""
    return next(iter(path.parent for path in folder.glob("*/*/run.lock")), None)


def writing(folder: Path) -> list[Path]:
    """Return the checkpoint files that are being written."""
    return list(folder.glob("*/*/weights/.*.tmp-*"))


def main() -> int:
    """Run the campaigns; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=0, help="over all cases")
    parser.add_argument(
        "--mutate", type=float, nargs="?", const=1.0, help="spoil each field of a checkpoint, or a share"
    )
    parser.add_argument("--flips", type=int, default=0, help="single bits of a checkpoint to flip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows, the hardware and the versions to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    right = True
    with tempfile.TemporaryDirectory(prefix="cvtrain-torture-") as folder:
        place = Path(folder)
        if args.kills:
            right &= killing(args, place, rows)
        if args.mutate:
            right &= mutations(place / "mutate", args.mutate, args.seed, rows)
        if args.flips:
            right &= flips(place / "flips", args.flips, args.seed, rows)
    if args.json:
        content = {"hardware": hardware(), "versions": versions(), "arguments": vars(args), "rows": rows}
        args.json.write_text(json.dumps(content, indent=1, default=str) + "\n")
    return 0 if right else 1


def killing(args: argparse.Namespace, place: Path, rows: list[dict[str, object]]) -> bool:
    """Run the cases in turn; print a line each and one for all."""
    cases = [case for case in (*CASES, PROCESS) if args.case in case.name]
    weights = [0.6 if case is PROCESS else 1.0 for case in cases]
    total, done, started = Tally(), 0.0, time.monotonic()
    for number, (case, weight) in enumerate(zip(cases, weights, strict=True)):
        done += weight
        kills = round(args.kills * done / sum(weights)) - total.kills
        if kills <= 0:
            continue
        folder = place / str(number)
        folder.mkdir()
        tally = (kill_processes if case is PROCESS else kill_case)(case, kills, args.seed, folder)
        shown = {"kills": tally.kills, "inside saves": tally.inside, "lost checkpoints": tally.lost,
                 "differing bits": tally.bits, "runs finished": tally.finished, "wrong": len(tally.wrong)}  # fmt: skip
        rows += [{"case": case.name, "variant": name, "value": value, "unit": "count"} for name, value in shown.items()]
        rows.append({"case": case.name, "variant": "slowest orphan", "value": tally.orphan_s, "unit": "s"})
        print(f"{case.name}: {', '.join(f'{value} {name}' for name, value in shown.items())}", flush=True)
        for text in tally.wrong:
            print(f"  WRONG: {text}", flush=True)
        for name in ("kills", "inside", "lost", "finished", "bits", "wrong"):
            setattr(total, name, getattr(total, name) + getattr(tally, name))
    print(
        f"{total.kills} kills ({total.inside} inside saves), {total.lost} lost checkpoints, "
        f"{total.bits} differing bits, {total.finished} runs finished, {len(total.wrong)} wrong; "
        f"{len(cases)} cases, seed {args.seed}, {time.monotonic() - started:.0f} s"
    )
    return not (total.lost or total.bits or total.wrong) and total.kills >= args.kills


if __name__ == "__main__":
    sys.exit(main())
