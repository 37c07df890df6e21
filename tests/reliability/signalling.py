"""A server for signals: forks whole runs, slows the phase that a signal is meant for, and says how they ended.

`python signalling.py FOLDER [NAME…]` prints one JSON object; test_signals.py runs it.
"""

import contextlib
import functools
import json
import mmap
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import torch
from torture_lives import Command, begin, ended, saved_step

import cvtrain.command.train as train_module
from cvtrain.data.loader import Loader
from cvtrain.engine import loop
from cvtrain.engine.checkpoint import CheckpointStore
from cvtrain.engine.signals import StopRequest

TERM, INT, HUP, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
SHORT = ("epochs=2", "limit_train_batches=6", "save_every_steps=null")
SHOWN = (*SHORT, "plots=true")
HOST = ("loader=host", "workers=2")


class Board:
    """One byte that says that the phase has begun, and the number of steps taken."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 16)

    def entered(self):
        return self.memory[0] == 1

    def steps(self):
        return self.memory[1]


def slow(owner, name, board, seconds, at=1):
    """Make the `at`-th call of a function begin by saying so and taking its time, in short sleeps."""
    function, calls = getattr(owner, name), [0]

    def slowed(*args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
            board.memory[0] = 1
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                time.sleep(0.01)
        return function(*args, **kwargs)

    setattr(owner, name, slowed)


def hung_data(board, after):
    """Yield some batches and then wait for ever, as on a drive that stopped answering."""
    batches = Loader.train_batches

    def hanging(*args, **kwargs):
        for number, batch in enumerate(batches(*args, **kwargs)):
            if number == after and board.steps() >= after:
                board.memory[0] = 1
                signal.pause()
                time.sleep(1000)
            yield batch

    Loader.train_batches = hanging


def kills_a_worker(board):
    """Kill a data worker in the middle of a step, where the main process does not wait for it."""
    step = loop.train_step

    def stepping(*args, **kwargs):
        if board.steps() == 4:
            board.memory[0] = 1
            multiprocessing.active_children()[0].kill()
            time.sleep(5)
        return step(*args, **kwargs)

    loop.train_step = stepping


def counted(board):
    step = loop.train_step

    def counting(*args, **kwargs):
        step(*args, **kwargs)
        board.memory[1] += 1

    loop.train_step = counting


PHASES = {
    "data": lambda board: slow(train_module, "_load", board, 0.5),
    "batch show": lambda board: slow(train_module, "show_batch", board, 0.5),
    "train": lambda board: slow(loop, "train_step", board, 0.5, at=4),
    "long step": lambda board: slow(loop, "train_step", board, 30.0, at=4),
    "save": lambda board: slow(CheckpointStore, "_commit", board, 0.5, at=1),
    "validation": lambda board: slow(loop, "evaluate_model", board, 0.5),
    "test": lambda board: slow(train_module, "evaluate_model", board, 0.5),
    "hung data": lambda board: hung_data(board, 4),
    "worker": kills_a_worker,
}


def prepare(board, phase, changes):
    counted(board)
    PHASES[phase](board)
    if changes.get("grace"):
        train_module.StopRequest = functools.partial(StopRequest, grace_s=changes["grace"])
    if changes.get("nohup"):
        signal.signal(HUP, signal.SIG_IGN)
    if changes.get("group"):
        os.setpgid(0, 0)


def case(place, name, phase, numbers, overrides=SHORT, **changes):
    """Run, send the signals once the phase has begun, and describe the end."""
    board, folder = Board(), place / name.replace(" ", "_")
    child = begin(Command.parse(tuple(overrides)), folder, lambda: prepare(board, phase, changes))
    deadline = time.monotonic() + 120
    while not board.entered() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    started = time.monotonic()
    for number in numbers:
        (os.killpg if changes.get("group") else os.kill)(child, number)
        time.sleep(0.1)
    first = -1
    while USR1 in numbers and first < 0 and time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, KeyError):  # before the first save there is nothing to read
            first = saved_step(folder)
    code = ended(child, 120)
    status = json.loads((folder / "status.json").read_text())
    return {"code": code, "seconds": time.monotonic() - started - 0.1 * len(numbers), "steps": board.steps(),
            "saved": saved_step(folder), "first": first, "status": status,
            "left": [path.name for path in folder.rglob(".*.tmp-*")]}  # fmt: skip


CASES = {
    **{f"{n.name} {p}": (p, [n], SHOWN if p == "batch show" else SHORT)
       for p in ("data", "batch show", "train", "save", "validation", "test") for n in (TERM, INT)},
    "SIGHUP train": ("train", [HUP]),
    "SIGHUP after nohup": ("train", [HUP], (*SHORT,), {"nohup": True}),
    "SIGUSR1 train": ("train", [USR1]),
    "twice": ("long step", [TERM, INT], (*SHORT, "save_every_steps=2")),
    "grace": ("long step", [TERM], (*SHORT, "save_every_steps=2"), {"grace": 1.0}),
    "worker killed": ("worker", [], (*SHORT, *HOST, "save_every_steps=2", "limit_train_batches=20")),
    "hung data": ("hung data", [INT], (*SHORT, "save_every_steps=2"), {"grace": 1.0}),
    "group with workers": ("train", [TERM], (*SHORT, *HOST), {"group": True}),
    "group with workers in validation": ("validation", [INT], (*SHORT, *HOST), {"group": True}),
}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, names = Path(sys.argv[1]), sys.argv[2:] or list(CASES)
    found = {}
    for name in names:
        phase, numbers, *rest = CASES[name]
        found[name] = case(place, name, phase, numbers, *rest[:1], **(rest[1] if len(rest) > 1 else {}))
    print(json.dumps(found))
