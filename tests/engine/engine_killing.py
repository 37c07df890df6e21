"""A fork server for kill -9 tests: imports once, stays single-threaded, forks a training child for each kill.

`python engine_killing.py FOLDER` prints one JSON object; test_engine_kill.py runs it.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from engine_parts import Watching, make_run, snapshot

from cvtrain.engine.loop import fit
from cvtrain.engine.monitor import Monitor
from cvtrain.errors import CvtrainError, Interrupted
from cvtrain.scheduler import OneCycle

EPOCHS, STEPS = 3, 9
START = 4  # in the second epoch, so that `best` is older than `last` and `previous`
OPERATIONS = 18  # 8 of the save at step 5, 10 of the one at step 6, which is also the best
KILLS_IN_A_ROW = 2


def resumable(folder, epochs, save_every_steps=1):
    """The run of the same command; the second of three epochs is the best, by the rate's rise and fall."""
    return make_run(
        folder, epochs=epochs, save_every_steps=save_every_steps, monitor=Monitor("lr", "max"), schedule=OneCycle(0.6)
    )


def digest(run):
    """One hash of everything, and one of the best checkpoint's weights."""
    everything = snapshot(run)
    everything["tensors"] = {k: hashlib.sha256(v).hexdigest() for k, v in everything["tensors"].items()}
    best, document = run.checkpoints.read("best.safetensors")
    weights = b"".join(v.contiguous().numpy().tobytes() for k, v in sorted(best.items()) if k.startswith("model/"))
    return [json.dumps(everything, sort_keys=True), [document["epoch"], hashlib.sha256(weights).hexdigest()]]


def train_in_child(folder, epochs, prepare=lambda run: None):
    """Fork a child that resumes and trains; return its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run = resumable(folder, epochs)
        run.checkpoints.restore(run)
        prepare(run)
        fit(run)
        code = 0
    except CvtrainError as error:
        sys.stderr.write(f"{error}\n")
    finally:
        os._exit(code)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(operation):
    """Arrange for a SIGKILL right before the `operation`-th call that makes something durable or visible."""
    left = [operation]

    def deadly(function):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    os.fsync, os.replace, os.link = deadly(os.fsync), deadly(os.replace), deadly(os.link)


def restored(folder, epochs):
    """Return the step that a resume would start at, or what is wrong."""
    run = resumable(folder, epochs)
    try:
        return run.state.step if run.checkpoints.restore(run) else "nothing to restore"
    except CvtrainError as error:
        return str(error)


def finish(folder, epochs):
    run = resumable(folder, epochs)
    try:
        run.checkpoints.restore(run)
        fit(run)
        return digest(run)
    except CvtrainError as error:
        return [str(error), None]


def points(root):
    """Kill at every operation of the two saves after a resume, several times in a row, then finish."""
    reference = resumable(root / "whole", EPOCHS, None)
    fit(reference)
    expected, results = digest(reference), []
    begun = resumable(root / "begun", EPOCHS, None)
    begun.display = Watching(lambda run: run.state.step == START and os.kill(os.getpid(), signal.SIGTERM))
    with begun.stop, contextlib.suppress(Interrupted):
        fit(begun)
    for operation in range(1, OPERATIONS + 1):
        folder = shutil.copytree(root / "begun", root / str(operation))
        before, steps, codes = restored(folder, EPOCHS), [], []
        for _ in range(KILLS_IN_A_ROW):
            codes.append(ended(train_in_child(folder, EPOCHS, lambda run, operation=operation: die_at(operation))))
            steps.append(restored(folder, EPOCHS))
        final = finish(folder, EPOCHS)
        results.append({"operation": operation, "before": before, "steps": steps, "codes": codes,
                        "run_same": final[0] == expected[0], "best_same": final[1] == expected[1]})  # fmt: skip
    return {"points": results, "best_epoch": expected[1][0], "total": reference.state.step}


def tell_steps(run, writer):
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def tell(_):
        with contextlib.suppress(OSError):
            os.write(writer, b"x")

    run.display = Watching(tell)


def random_kills(root, kills=20, seed=0):
    """Kill at random moments of a run that saves after every step."""
    epochs, chance, folder = 40, random.Random(seed), root / "run"
    reference = resumable(root / "long", epochs, None)
    fit(reference)
    steps, killed = [], 0
    for _ in range(kills):
        reader, writer = os.pipe()
        child = train_in_child(folder, epochs, lambda run, writer=writer: tell_steps(run, writer))
        os.close(writer)
        for _ in range(chance.randint(3, 6)):  # at the third step, the first one's save is done
            os.read(reader, 1)
        os.close(reader)
        time.sleep(chance.uniform(0.0, 0.004))
        os.kill(child, signal.SIGKILL)
        killed += ended(child) == -signal.SIGKILL
        steps.append(restored(folder, epochs))
    final, expected = finish(folder, epochs), digest(reference)
    left = [path.name for path in folder.iterdir() if ".tmp-" in path.name]
    return {"killed": killed, "steps": steps, "total": reference.state.step, "left": left,
            "run_same": final[0] == expected[0], "best_same": final[1] == expected[1]}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    print(json.dumps({**points(place), "random": random_kills(place)}))
