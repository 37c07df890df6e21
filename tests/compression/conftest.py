import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from cvtrain.core.artifact import CompressionContext
from cvtrain.core.weights import save_weights, to_bytes
from cvtrain.export import export_onnx

METADATA = {"class_names": '["a", "b", "c"]', "version": "1"}


class TinyNet(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(16, classes)

    def forward(self, images):
        return self.head(self.features(images))


def few_steps(model, epochs, lr=0.1, teacher=None):
    """Real training on random pictures, one step an epoch."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    parameter = next(model.parameters())
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    for _ in range(epochs):
        images = torch.randn((8, channels, 8, 8), generator=generator, dtype=parameter.dtype)
        labels = torch.randint(0, 3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()


def random_gradients(model, batches):
    generator = torch.Generator().manual_seed(5)
    for _ in range(batches):
        images = torch.randn((8, 1, 8, 8), generator=generator)
        labels = torch.randint(0, 3, (8,), generator=generator)
        nn.functional.cross_entropy(model(images), labels).backward()


_exported = {}


def cached_export(model, example, path):
    """Export to ONNX; the same weights are exported once a session, because an export takes seconds."""
    key = repr(model) + str(example.shape) + hashlib.sha256(to_bytes(model.state_dict(), {})).hexdigest()
    if key not in _exported:
        export_onnx(model, example, path, METADATA)
        _exported[key] = path.read_bytes()
    path.write_bytes(_exported[key])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyNet().eval()


@pytest.fixture
def make_context(tmp_path: Path):
    def make(example=None, batches=None, finetune=few_steps, evaluate=lambda model: 0.0):
        shown = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(2)) if example is None else example
        generator = torch.Generator().manual_seed(3)
        pictures = [torch.randn((20, *shown.shape[1:]), generator=generator) for _ in range(4)]
        return CompressionContext(
            folder=tmp_path,
            example=shown,
            calibration=lambda: iter(pictures if batches is None else batches),
            finetune=finetune,
            evaluate=evaluate,
            backward=random_gradients,
            save_weights=lambda model, path, given: save_weights(model, path, {**METADATA, **given}),
            export_onnx=lambda model, path: cached_export(model, shown, path),
        )

    return make
