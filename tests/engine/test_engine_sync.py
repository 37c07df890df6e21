"""Between two logs a step copies nothing to the host: counted on a CPU, refused by the driver on a GPU."""

import math
from collections import Counter

import pytest
import torch
from engine_parts import CLASSES, make_run, network, sets
from torch.utils._python_dispatch import TorchDispatchMode

from cvtrain.averaging import Ema, Swa
from cvtrain.core.types import Batch
from cvtrain.distillation import KnowledgeDistillation, Teacher
from cvtrain.engine.loop import log_step, train_step
from cvtrain.engine.state import TERMS, TrainState
from cvtrain.precision import Bf16

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
}


class Reads(TorchDispatchMode):
    """Counts the operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


def teacher():
    data = sets()
    return Teacher(network(), data.class_names, data.preprocess, data.class_names, data.preprocess, "0" * 64)


def distilled():
    kd = KnowledgeDistillation(teacher())
    return {"distillation": kd, "state": TrainState.new(torch.device("cpu"), (*TERMS, *kd.terms))}


PARTS = {
    "defaults": dict,
    "mixup and clipping by value": lambda: {"mix": True, "clip_grad_value": 0.1},
    "no clipping": lambda: {"clip_grad_norm": None},
    "one micro-batch": lambda: {"grad_accum_steps": 1},
    "ema": lambda: {"averaging": Ema()},
    "swa": lambda: {"averaging": Swa()},
    "bf16": lambda: {"precision": Bf16()},
    "skip": lambda: {"on_nan": "skip"},
    "distillation": distilled,
}


def steps(run, count):
    """Yield the micro-batches of `count` steps, from as many epochs as that takes."""
    size = run.options.grad_accum_steps
    for epoch in range(count):
        batches = list(run.loader.train_batches(epoch))
        for i in range(0, len(batches) - size + 1, size):
            yield batches[i : i + size]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("parts", PARTS)
def test_a_step_reads_nothing_back_and_a_log_reads_once(tmp_path, optimizer, parts):
    run = make_run(tmp_path, **{"mix": False, "optimizer": OPTIMIZERS[optimizer], "epochs": 4, **PARTS[parts]()})
    run.averaging.begin(run.model)
    run.model.train()
    taken = steps(run, 4)
    train_step(run, next(taken))  # optimizers fill their state
    with Reads() as reads:
        for _ in range(5):
            train_step(run, next(taken))
            run.display.step(run)
    assert reads.counts["aten::addmm"] >= 5
    assert reads.counts["aten::_local_scalar_dense"] == 0
    run.state.batch = 6 * run.options.grad_accum_steps
    log_step(run)
    means = run.state.means()
    assert math.isfinite(means["train/loss"])
    assert means["train/loss"] > 0


def test_the_counting_sees_what_the_textbook_reads():
    with Reads() as reads:
        torch.ones(2).sum().item()
    assert reads.counts["aten::_local_scalar_dense"] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_on_a_gpu_never_waits_for_it(tmp_path, optimizer):
    device = torch.device("cuda", 0)
    model = network().to(device)
    run = make_run(
        tmp_path, model=model, optimizer=OPTIMIZERS[optimizer], state=TrainState.new(device), grad_accum_steps=1
    )
    run.device = device
    run.precision.setup(device, model, lambda trial: trial(torch.zeros(2, 1, 6, 6, device=device)).sum())
    images = torch.randint(0, 256, (8, 1, 6, 6), dtype=torch.uint8, device=device)
    batch = Batch(images, torch.arange(8, device=device) % CLASSES, torch.arange(8).numpy())
    model.train()
    for _ in range(3):
        train_step(run, [batch])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            train_step(run, [batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(run.state.means()["train/loss"])
