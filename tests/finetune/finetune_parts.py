"""Small real networks with a strategy, in a run made by hand of the real parts."""

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from torchvision import models

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
from engine_parts import CLASSES, make_run, snapshot

from cvtrain.averaging import NoAveraging
from cvtrain.core.stages import find_stages
from cvtrain.core.types import DataSets, Preprocess
from cvtrain.data import ArraySource
from cvtrain.finetune import Progressive
from cvtrain.model import SimpleCNN
from cvtrain.optimizer import muon, param_groups

SIDE = 32
MAKERS = {
    "simple_cnn": lambda: SimpleCNN(CLASSES, 1, SIDE, [4, 6, 8]),
    "resnet": lambda: timm.create_model("test_resnet", in_chans=1, num_classes=CLASSES),
    "mobilenet": lambda: models.mobilenet_v3_small(num_classes=CLASSES),
    "vit": lambda: timm.create_model("test_vit", in_chans=1, num_classes=CLASSES, img_size=SIDE),
}
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "muon": lambda groups: muon(groups, 0.1, 0.95, True, (0.9, 0.95), 0.1),
}


def network(name, seed=0):
    torch.manual_seed(seed)
    return MAKERS[name]()


def channels(name):
    return 3 if name == "mobilenet" else 1


def pictures(count, seed, channels):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    images = rng.integers(0, 256, (count, channels, SIDE, SIDE)).astype(np.uint8)
    images[np.arange(count), :, labels * 8] = 255
    return ArraySource(torch.from_numpy(images), labels.astype(np.int64), [str(i) for i in range(count)])


def sets(channels=1):
    preprocess = Preprocess(SIDE, SIDE, channels, (0.5,) * channels, (0.25,) * channels)
    parts = (pictures(count, seed, channels) for seed, count in enumerate((12, 4, 4)))
    return DataSets("bars", ["a", "b", "c"], preprocess, *parts)


def stages_of(name):
    return find_stages(network(name), (channels(name), SIDE, SIDE))


def run_of(folder, name, strategy, optimizer="sgd", averaging=None, seed=0, **changes):
    """A run of `epochs` of 3 steps, with mixup and so with precise batch norm; the average has begun."""
    model = network(name, seed).to(memory_format=torch.channels_last)
    averaging = averaging or NoAveraging()
    averaging.begin(model)

    def groups(_):
        return OPTIMIZERS[optimizer](param_groups(model, 0.1, strategy.part_of))

    options = {"epochs": 2, "base_lr": 0.02, "grad_accum_steps": 1, "clip_grad_norm": None}
    return make_run(
        folder, data=sets(channels(name)), model=model, finetune=strategy, optimizer=groups, averaging=averaging,
        **{**options, **changes},
    )  # fmt: skip


PHASES = {
    "head": {"epochs": 1, "head_lr": 1e-2, "late_lr": None, "early_lr": None},
    "late": {"epochs": 1, "head_lr": 4e-3, "late_lr": 1e-3, "early_lr": None},
    "all": {"epochs": None, "head_lr": 5e-3, "late_lr": 1e-3, "early_lr": 1e-4},
}


def progressive(name, epochs=3, **changes):
    settings = {"phases": PHASES, "early_stages": None, "stages": stages_of(name), "epochs": epochs}
    return Progressive(**{**settings, **changes})


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def everything(run):
    """`snapshot` with the average."""
    average = {name: value.contiguous().numpy().tobytes() for name, value in run.averaging.tensors().items()}
    return {**snapshot(run), "average": average}


def moved(before, model):
    """Names of tensors of the state dict that are not equal to the bit."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def names_of(model, stages):
    """Parameters, and parameters with buffers, of `stages`."""
    parameters = {name for stage in stages for name in stage.parameters}
    paths = tuple(f"{path}." for stage in stages for path in stage.modules)
    return parameters, parameters | {name for name in model.state_dict() if name.startswith(paths)}


def with_state(run):
    """Names of parameters that the optimizer keeps anything of."""
    return {
        name
        for group in run.optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if run.optimizer.state.get(p)
    }
