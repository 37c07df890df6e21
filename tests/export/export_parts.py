"""A network of 8 x 8 pictures and what its files carry, for the tests of every exporter."""

import json

import numpy as np
import torch
from torch import nn

from cvtrain.core.types import Preprocess

PREP = Preprocess(img_size=8, resize=11, channels=3, mean=(0.2, 0.5, 0.7), std=(0.3, 0.2, 0.6))
METADATA = {
    "cvtrain_version": "1.0",
    "task": "classification",
    "class_names": '["cat", "dög \\"x\\" <y> & \\u2028"]',
    "preprocess": json.dumps(PREP.to_dict()),
    "git": "",
}
EXAMPLE = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))


def tiny():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(144, 2))
    model = nn.Sequential(*layers).eval()
    model[1].running_mean.fill_(0.3)
    return model


def pictures(size, channels=3, side=11):
    return np.random.default_rng(size).integers(0, 256, (size, channels, side, side), dtype=np.uint8)


def logits_by_hand(model, images):
    """The answers to uint8 pictures, with the preprocessing written out in float64."""
    centre = images[:, :, 1:9, 1:9].astype(np.float64) / 255
    mean, std = (np.array(values).reshape(1, -1, 1, 1) for values in (PREP.mean, PREP.std))
    with torch.no_grad():
        return model(torch.from_numpy((centre - mean) / std).float()).numpy().astype(np.float64)
