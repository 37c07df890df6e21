"""A fork server for training in several processes: imports once, forks the processes of each case.

`python distributed_campaign.py FOLDER CASE…` prints one JSON object; test_distributed_training.py runs it.
"""

import copy
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
import torch
from engine_parts import CPU, Watching, make_run, network, sets, snapshot
from torch import nn

from cvtrain.averaging import Ema
from cvtrain.core import distributed
from cvtrain.core.stages import Stage
from cvtrain.data import Loader, LoaderConfig
from cvtrain.engine.checkpoint import CheckpointStore, SharedCheckpoints
from cvtrain.engine.loop import evaluate_model, fit
from cvtrain.engine.ranks import SharedStop
from cvtrain.errors import DivergedError, Interrupted
from cvtrain.finetune import Progressive as Unfreezing
from cvtrain.optimizer import param_groups
from cvtrain.resizing import Progressive

TIMEOUT_S = 90
DATA = sets(train=21, val=13)  # the last batch has 5 pictures: 3 and 2; the val split's parts have 7 and 6


def build(folder, batch_size=None, data=DATA, grad_accum_steps=1, stop=None, **changes):
    """The run of `engine_parts` as this process's part of a shared one."""
    batch_size = batch_size or (6 if distributed.world_size() == 3 else 8)
    loader = Loader(
        data, LoaderConfig(batch_size, 5, CPU, rank=distributed.rank(), world_size=distributed.world_size())
    )
    store = CheckpointStore if distributed.main() else SharedCheckpoints
    own = folder if distributed.main() else folder / f"scratch-{distributed.rank()}"
    own.mkdir(parents=True, exist_ok=True)
    run = make_run(
        own, data=data, batch_size=batch_size, grad_accum_steps=grad_accum_steps, rank=distributed.rank(),
        loader=loader, checkpoints=store(own, {"class_names": data.class_names}),
        stop=stop or SharedStop(), **changes,
    )  # fmt: skip
    run.share()
    return run


def plain(folder, **changes):
    """A run without batch norm, dropout and mixing: what it computes does not depend on who shares it."""
    torch.manual_seed(0)
    return build(folder, model=network(norm=False, dropout=0.0), mix=False, **changes)


def digest(run):
    everything = repr(snapshot(run))
    return hashlib.sha256(everything.encode()).hexdigest()


def weights(run):
    return torch.cat([p.detach().reshape(-1) for p in run.model.parameters()]).tolist()


def same_steps(rank, folder):
    run = plain(folder, epochs=2, grad_accum_steps=2, clip_grad_norm=0.7)
    fit(run)
    return {"weights": weights(run), "history": run.state.history, "images": run.state.images}


def evaluation(rank, folder):
    run = build(folder)
    metrics, logits = evaluate_model(run, run.model, "val")
    limited = build(folder, limit_eval_batches=1)
    some = evaluate_model(limited, limited.model, "val")[1]
    return {"metrics": metrics.compute(), "logits": logits.tolist(), "limited": some.tolist()}


def equal_states(rank, folder):
    seen = []
    display = Watching(after=lambda run: seen.append(state_hash(run)))
    fit(build(folder, epochs=2, averaging=begun(Ema(0.9)), display=display))
    return {"states": seen}


def begun(averaging):
    """Averages copy the model, which is the same at first for the same seed."""
    torch.manual_seed(0)
    averaging.begin(network().to(memory_format=torch.channels_last))
    return averaging


def state_hash(run):
    tensors = [*run.model.state_dict().values()]
    tensors += [v for p in run.model.parameters() for v in run.optimizer.state[p].values() if torch.is_tensor(v)]
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def stopped_and_resumed(rank, folder):
    """SIGTERM reaches the last process only, within an epoch; the run goes on with as many processes."""
    whole = build(folder / "whole", epochs=3)
    fit(whole)
    last = distributed.world_size() - 1
    at = 4

    def kill(run):
        if rank == last and run.state.step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    with SharedStop() as stop:
        first = build(folder / "cut", epochs=3, stop=stop, display=Watching(after=kill))
        try:
            fit(first)
            code = 0
        except Interrupted as error:
            code = error.exit_code
    second = build(folder / "cut", epochs=3)
    name = second.checkpoints.restore(second)
    restored = (second.state.epoch, second.state.step, second.state.batch)
    fit(second)
    return {
        "code": code, "stopped_at": first.state.step, "restored": restored, "from": name,
        "same": digest(second) == digest(whole), "history_same": second.state.history == whole.state.history,
        "written": sorted(p.name for p in (folder / "cut").rglob("*.safetensors")),
    }  # fmt: skip


def other_number(rank, folder):
    """Continue, as two, what one process has left in mid-epoch, and leave at the same place for one."""
    run = plain(folder, epochs=3)
    run.checkpoints.restore(run)
    seen = [run.state.step, round(run.state.totals()[-2])]
    fit(run)
    return {"began": seen, "weights": weights(run), "history": run.state.history}


def one_process_until_step_4(folder):
    class EnoughError(Exception):
        pass

    def leave(run):
        if run.state.step == 5:
            raise EnoughError

    run = plain(folder, epochs=3, save_every_steps=4, display=Watching(after=leave))
    try:
        fit(run)
    except EnoughError:
        run.checkpoints.wait()
    return {}


def diverging(rank, folder):
    run = build(folder, model=Poisoned(rank == distributed.world_size() - 1), mix=False)
    try:
        fit(run)
    except DivergedError as error:
        return {"step": error.step, "finite": all(bool(p.isfinite().all()) for p in run.model.parameters()),
                "saved": (folder / "last.safetensors").exists()}  # fmt: skip
    return {}


class Poisoned(nn.Sequential):
    """A network whose loss becomes infinite in one process, at its fourth step."""

    def __init__(self, here):
        torch.manual_seed(0)
        super().__init__(*network(norm=False, dropout=0.0))
        self.here, self.calls = here, 0

    def forward(self, images):
        self.calls += self.training
        output = super().forward(images)
        return output * float("inf") if self.here and self.training and self.calls == 4 else output


class Layers(nn.Sequential):
    """Three stages: a convolution, another, and the head."""

    def __init__(self, norm):
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Conv2d(i, 6, 3, padding=1), norm(6), nn.ReLU()) for i in (1, 6)]
        super().__init__(*blocks, nn.Sequential(nn.Flatten(), nn.Linear(6 * 36, 3)))


def thawing(folder, norm, mix=False, **changes):
    """Head, late stage and all train for an epoch each, with an average."""
    model = Layers(norm).to(memory_format=torch.channels_last)
    kinds = ("stem", "stage1", "head")
    stages = [Stage(kind, (str(i),), tuple(f"{i}.{n}" for n, _ in model[i].named_parameters()))
              for i, kind in enumerate(kinds)]  # fmt: skip
    phases = {
        "head": {"epochs": 1, "head_lr": 0.1, "late_lr": None, "early_lr": None},
        "late": {"epochs": 1, "head_lr": 0.1, "late_lr": 0.05, "early_lr": None},
        "all": {"epochs": None, "head_lr": 0.1, "late_lr": 0.05, "early_lr": 0.02},
    }
    finetune, average = Unfreezing(phases, 1, stages, 3), Ema(0.5)
    average.begin(model)

    def optimizer(_):
        return torch.optim.SGD(param_groups(model, 1e-2, finetune.part_of), lr=0.1, momentum=0.9, fused=True)

    return build(
        folder, model=model, finetune=finetune, averaging=average, optimizer=optimizer, mix=mix, epochs=3, **changes
    )


def unfreezing(rank, folder):
    run = thawing(folder, lambda width: nn.Identity())
    before = copy.deepcopy(run.model.state_dict())
    moved = []
    run.display = Watching(ended=lambda run: moved.append(moved_parts(run, before)))
    fit(run)
    return {"weights": weights(run), "moved": moved}


def moved_parts(run, before):
    return sorted({name[0] for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])})


def unfreezing_resumed(rank, folder):
    """SIGTERM in the middle of the phase in which the late stage trains; batch norm and mixup take part."""
    norm = nn.BatchNorm2d
    whole = thawing(folder / "whole", norm, mix=True)
    before = copy.deepcopy(whole.model.state_dict())
    moved = []
    whole.display = Watching(ended=lambda run: moved.append(moved_parts(run, before)))
    fit(whole)

    def kill(run):
        if rank == 0 and run.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with SharedStop() as stop:
        first = thawing(folder / "cut", norm, mix=True, stop=stop, display=Watching(after=kill))
        try:
            fit(first)
            code = 0
        except Interrupted as error:
            code = error.exit_code
    second = thawing(folder / "cut", norm, mix=True)
    second.checkpoints.restore(second)
    began = (second.state.epoch, second.state.step)
    fit(second)
    averages = [{k: v.tolist() for k, v in run.averaging.tensors().items()} for run in (whole, second)]
    return {"code": code, "moved": moved, "began": began, "same": digest(second) == digest(whole),
            "average_same": averages[0] == averages[1], "state": digest(second)}  # fmt: skip


def resized(rank, folder):
    phases = {"small": {"img_size": 4, "epochs": 1}, "full": {"img_size": 6, "epochs": 1}}
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    model = nn.Sequential(*layers)
    run = build(folder, model=model, mix=False, resizing=Progressive(phases, 2, 6))
    fit(run)
    return {"weights": weights(run)}


def dying(rank, folder):
    """The last process is killed in the middle of training; what do the others hear, and when?"""
    last = distributed.world_size() - 1
    killed = folder / "killed"

    def kill(run):
        if rank == last and run.state.step == 4:
            killed.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    run = build(folder, epochs=50, display=Watching(after=kill))
    try:
        fit(run)
    except Exception as caught:
        error = distributed.explained(caught)
        return {"type": type(error).__name__, "text": str(error), "code": getattr(error, "exit_code", None),
                "seconds": time.time() - float(killed.read_text()), "speaker": distributed.speaker()}  # fmt: skip
    return {}


def failing(rank, folder):
    """One process has an error of its own; the others hear what it was."""
    from cvtrain.errors import DataError

    run = build(folder, epochs=50)
    try:
        if rank == distributed.world_size() - 1:
            raise DataError("a picture cannot be read.\nRemove it.")
        fit(run)
    except Exception as caught:
        error = distributed.explained(caught)
        distributed.tell(error)
        return {"type": type(error).__name__, "text": str(error), "code": error.exit_code}
    return {}


def shares(rank, folder):
    """What process 0 alone calls; averages and parts of unequal length."""
    values = torch.full((2, 2), float(rank))
    distributed.average([values])
    part = torch.arange(rank * 10, rank * 10 + rank) if rank else None
    return {
        "shared": distributed.shared(lambda: rank + 40),
        "average": values.tolist(),
        "gathered": distributed.gather(part).tolist(),
        "largest": distributed.largest(torch.tensor([float(rank), -float(rank)])).tolist(),
    }


CASES = {f.__name__: f for f in (
    same_steps, evaluation, equal_states, stopped_and_resumed, other_number, diverging, unfreezing, unfreezing_resumed,
    resized, dying, failing, shares,
)}  # fmt: skip


def together(world, work, folder):
    """Run `work(rank, folder)` in `world` forked processes; return what each returned, None for one that died."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ends = [context.Pipe(duplex=False) for _ in range(world)]
    children = [
        context.Process(target=child, args=(rank, world, port, work, folder, ends[rank][1])) for rank in range(world)
    ]
    for process in children:
        process.start()
    for _, theirs in ends:
        theirs.close()
    results = []
    until = time.monotonic() + TIMEOUT_S
    for ours, _ in ends:
        try:
            results.append(ours.recv() if ours.poll(max(0, until - time.monotonic())) else "timeout")
        except EOFError:
            results.append(None)
    for process in children:
        process.join(max(0.1, until - time.monotonic()))
        if process.is_alive():
            process.kill()
    return results


def child(rank, world, port, work, folder, pipe):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        distributed.init("cpu", 60)
        result = work(rank, folder)
    except BaseException:
        result = {"error": traceback.format_exc()}
    pipe.send(result)
    pipe.close()
    time.sleep(0.5 if work in (dying, failing) else 0)
    os._exit(0)


def main(root, *plan):
    torch.set_num_threads(1)
    answers = {}
    for text in plan:  # case:world, or the name of something that one process does
        name, _, world = text.partition(":")
        folder = root / name
        if world:
            answers[text] = together(int(world), CASES[name], folder)
        else:
            answers[text] = globals()[f"one_process_{name}"](root / "other_number")
    return answers


def one_process_alone(folder):
    """Everything that can be compared, by one process."""
    return {
        "same_steps": same_steps(0, folder.parent / "a"), "evaluation": evaluation(0, folder.parent / "b"),
        "unfreezing": unfreezing(0, folder.parent / "c"), "resized": resized(0, folder.parent / "d"),
        "whole": other_number(0, folder.parent / "e"),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *sys.argv[2:])))
