"""A small but complete run, made by hand of the real parts; also imported by the forked children of the kill test."""

import numpy as np
import torch
from torch import nn

from cvtrain.aug import Augmentation, MixUp
from cvtrain.averaging import NoAveraging
from cvtrain.core.types import DataSets, Preprocess
from cvtrain.data import ArraySource, Loader, LoaderConfig
from cvtrain.distillation import NoDistillation
from cvtrain.engine.checkpoint import CheckpointStore
from cvtrain.engine.monitor import Monitor
from cvtrain.engine.run import TrainOptions, TrainRun
from cvtrain.engine.signals import StopRequest
from cvtrain.engine.state import TrainState
from cvtrain.finetune import Full
from cvtrain.logger import NoLogger
from cvtrain.loss import CrossEntropy
from cvtrain.optimizer import param_groups
from cvtrain.precision import Fp32
from cvtrain.regularizer import LabelSmoothing
from cvtrain.resizing import Constant
from cvtrain.scheduler import Plateau
from cvtrain.task import Classification

CPU = torch.device("cpu")
CLASSES = 3


class Noise:
    """Adds noise of each sample's own."""

    def __call__(self, images, draw):
        noise = torch.from_numpy(draw(images[0].numel())).view_as(images)
        return (images + 51 * (noise - 0.5)).clamp(0, 255).to(torch.uint8)


def source(count, seed):
    rng = np.random.default_rng(seed)
    templates = np.random.default_rng(0).integers(60, 196, (CLASSES, 1, 6, 6))
    labels = rng.integers(0, CLASSES, count)
    images = np.clip(templates[labels] + rng.normal(0, 50, (count, 1, 6, 6)), 0, 255).astype(np.uint8)
    return ArraySource(torch.from_numpy(images), labels.astype(np.int64), [str(i) for i in range(count)])


def sets(train=22, val=12):
    preprocess = Preprocess(6, 6, 1, (0.5,), (0.25,))
    return DataSets("blobs", ["a", "b", "c"], preprocess, source(train, 1), source(val, 2), source(val, 3))


def network(norm=True, dropout=0.2):
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Flatten(), nn.Linear(6 * 9, CLASSES))


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)


def adamw(groups):
    return torch.optim.AdamW(groups, lr=0.02)


def make_run(folder, data=None, model=None, weights_seed=0, optimizer=sgd, batch_size=4, mix=True, **changes):
    """Return a run that has not begun; `changes` are fields of TrainRun, or of TrainOptions."""
    data = data or sets()
    torch.manual_seed(weights_seed)
    model = model or network()
    option_names = TrainOptions.__dataclass_fields__
    options = {"epochs": 2, "seed": 5, "base_lr": 0.1, "grad_accum_steps": 2, "clip_grad_norm": 0.7}
    options |= {key: changes.pop(key) for key in list(changes) if key in option_names}
    if options.get("channels_last", True):
        model = model.to(memory_format=torch.channels_last)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "preprocess": data.preprocess,
        "loader": Loader(data, LoaderConfig(batch_size, options["seed"], CPU)),
        "augmentation": Augmentation({"noise": Noise()}, {"mixup": MixUp(0.4)} if mix else {}),
        "resizing": Constant(options["epochs"], data.preprocess.img_size),
        "task": Classification(CrossEntropy(), [LabelSmoothing(0.1)], CLASSES),
        "optimizer": optimizer(param_groups(model, 1e-2)),
        "schedule": Plateau(0.5, plateau_epochs=0, warmup_epochs=0.5),
        "precision": Fp32(),
        "finetune": Full(),
        "averaging": NoAveraging(),
        "distillation": NoDistillation(),
        "monitor": Monitor("val/loss", "min", min_delta=0.3),
        "checkpoints": CheckpointStore(folder, {"class_names": data.class_names}),
        "tracker": NoLogger(),
        "stop": StopRequest(),
        "state": TrainState.new(CPU),
    }
    return TrainRun(options=TrainOptions(**options), device=CPU, model=model, **{**parts, **changes})


def snapshot(run):
    """Everything by which two runs could differ, bytes for bytes; time aside. The rate is in the history."""
    tensors = {f"model/{name}": value for name, value in run.model.state_dict().items()}
    scalars = {}
    for group in run.optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for key, value in run.optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer/{name}/{key}"] = value
                else:
                    scalars[f"optimizer/{name}/{key}"] = value
    tensors["sums"] = run.state.rows()
    state = run.state
    return {
        "tensors": {name: value.contiguous().numpy().tobytes() for name, value in tensors.items()},
        "scalars": scalars,
        "counters": (state.epoch, state.step, state.batch, state.images),
        "history": state.history,
        "monitor": dict(vars(run.monitor)),
        "schedule": run.schedule.state(),
    }


class Watching:
    """A display that calls `after(run)` behind every step and `ended(run)` behind every epoch."""

    def __init__(self, after=lambda run: None, ended=lambda run: None):
        self.after, self.ended = after, ended

    def begin(self, *_):
        pass

    def step(self, run):
        self.after(run)

    def end_epoch(self, run, row, improved):
        self.ended(run)

    def end(self):
        pass
