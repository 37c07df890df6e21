"""A teacher as a finished run leaves it: a model.safetensors with its classes and preprocessing."""

import json

import torch

from cvtrain.build import build_model
from cvtrain.core.types import Preprocess
from cvtrain.core.weights import save_weights

DIGITS = [str(i) for i in range(10)]
PREPROCESS = Preprocess(8, 8, 1, (0.25,), (0.5,))


def write_teacher(path, names=DIGITS, preprocess=PREPROCESS, seed=3, task="classification", target=None, state=None):
    """Write untrained weights, or `state`, to `path`; returns it."""
    from cvtrain.build import Builder

    torch.manual_seed(seed)
    node = {"_target_": target or "cvtrain.model.SimpleCNN", "widths": [6, 8]}
    shipped = {**node, "_target_": "cvtrain.model.SimpleCNN"}
    model = build_model(Builder({}, []), shipped, len(names), preprocess.channels, preprocess.img_size)
    if state is not None:
        model.load_state_dict(state)
    metadata = {
        "task": task,
        "class_names": json.dumps(list(names)),
        "preprocess": json.dumps(preprocess.to_dict()),
        "model": json.dumps(node),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(model, path, metadata)
    return path
