"""A server for faults of the disk: forks a process for each system call of a save and has strace make it fail.

`python faulting.py FOLDER` prints one JSON object; test_storage_faults.py runs it.
"""

import ctypes
import json
import logging
import mmap
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import torch
from engine_parts import make_run

from cvtrain.errors import CvtrainError

CALLS = ("write", "fsync", "rename", "link", "linkat")
PTRACER_ANY = ctypes.c_ulong(-1)


def saving(folder, go, board):
    """In a child: restore, wait for strace, save once as the best; report how it ended."""
    run = make_run(folder)
    run.checkpoints.restore(run)
    run.state.step += 1
    os.read(go, 1)
    answer = {"code": 0, "text": ""}
    try:
        run.checkpoints.save(run, best=True)
        run.checkpoints.wait()
    except CvtrainError as error:
        answer = {"code": error.exit_code, "text": str(error)}
    board.write(json.dumps(answer).encode())  # memory: a call to write could be the one that fails


def traced(folder, *inject):
    """Save once under strace; return what happened."""
    go, start = os.pipe()
    board = mmap.mmap(-1, 4096)
    child = os.fork()
    if child == 0:
        try:
            ctypes.CDLL(None).prctl(0x59616D61, PTRACER_ANY, 0, 0, 0)  # PR_SET_PTRACER: strace is no parent of this
            saving(folder, go, board)
        finally:
            os._exit(0)
    trace = folder.with_suffix(".strace")
    options = [f"--inject={text}" for text in inject]
    argv = ["strace", "-f", "-y", "-p", str(child), "-o", str(trace), f"--trace={','.join(CALLS)}", *options]
    tracer = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    attached = Path(f"/proc/{child}/status")
    deadline = time.monotonic() + 20
    while "TracerPid:\t0\n" in attached.read_text() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.write(start, b"x")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tracer.wait(20)
    text = board[:].rstrip(b"\0").decode()
    for descriptor in (go, start):
        os.close(descriptor)
    ended = json.loads(text) if text else {"code": status, "text": ""}
    left = [path.name for path in folder.iterdir() if ".tmp-" in path.name]
    again = make_run(folder)
    try:
        name = again.checkpoints.restore(again)
        step = again.state.step
    except CvtrainError as error:
        name, step = str(error), -1
    calls = [line.split(" ", 1)[1].strip() for line in trace.read_text().splitlines() if "(" in line]
    calls = [call for call in calls if str(folder) in call]
    names = sorted(path.name for path in folder.iterdir())
    return {**ended, "left": left, "name": name, "step": step, "calls": calls, "names": names}


def begun(folder):
    """Three saves: the first one the best; each file stands for itself."""
    run = make_run(folder)
    for step, best in ((1, True), (2, False), (3, False)):
        run.state.step = step
        run.checkpoints.save(run, best)
    run.checkpoints.wait()
    return folder


def campaign(place):
    base = begun(place / "begun")
    plain = traced(shutil.copytree(base, place / "plain"))
    counts = {name: sum(call.startswith(f"{name}(") for call in plain["calls"]) for name in CALLS}
    results = []
    for name, count in counts.items():
        for number in range(1, count + 1):
            for kind, inject in (
                ("kill", f"{name}:signal=SIGKILL:when={number}"),
                ("eio", f"{name}:error=EIO:when={number}"),
                ("full once", f"{name}:error=ENOSPC:when={number}"),
                ("full", f"{name}:error=ENOSPC:when={number}+"),
            ):
                folder = shutil.copytree(base, place / f"{name}{number}{kind.replace(' ', '_')}")
                results.append({"call": name, "number": number, "kind": kind, **traced(folder, inject)})
                shutil.rmtree(folder)
    return {"plain": plain, "counts": counts, "points": results}


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    print(json.dumps(campaign(Path(sys.argv[1]))))
