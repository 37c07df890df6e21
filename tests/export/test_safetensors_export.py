import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from cvtrain.core.artifact import TORCH
from cvtrain.errors import StorageError
from cvtrain.export import Safetensors, write_preprocess

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Tied(nn.Module):
    """Two layers share one weight, and a buffer is not contiguous."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("turned", torch.arange(12.0).view(3, 4).t())

    def forward(self, images):
        return self.second(self.first(images))[:, 0, 0]


def read(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def test_tied_and_turned_tensors_survive_and_load_strictly(tmp_path):
    torch.manual_seed(0)
    model = Tied()
    artifact = Safetensors().export(model, EXAMPLE, tmp_path, {"version": "1", "class_names": '["a"]'})
    tensors, metadata = read(artifact.path)
    assert metadata == {"version": "1", "class_names": '["a"]'}
    other = Tied()
    other.load_state_dict(tensors, strict=True)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())
    assert model.second.weight is model.first.weight


def test_the_artifact_names_its_file_and_runtime(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten())
    artifact = Safetensors().export(model, EXAMPLE, tmp_path, {}, "pruned")
    assert (artifact.name, artifact.path, artifact.runtime) == ("safetensors", tmp_path / "pruned.safetensors", TORCH)
    assert Safetensors().retry(model, EXAMPLE, tmp_path, {}) is None
    assert (artifact.params, artifact.macs) == (386, 384)


def test_a_folder_that_does_not_exist_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError):
        Safetensors().export(nn.Flatten(), EXAMPLE, tmp_path / "missing", {})


def test_preprocess_json_is_readable_json_with_versions_left_as_text(tmp_path):
    metadata = {"class_names": '["cat", "dög"]', "preprocess": '{"mean": [0.5]}', "version": "1.10", "odd": "[x"}
    path = write_preprocess(tmp_path, metadata)
    assert path == tmp_path / "preprocess.json"
    assert json.loads(path.read_text()) == {
        "class_names": ["cat", "dög"],
        "preprocess": {"mean": [0.5]},
        "version": "1.10",
        "odd": "[x",
    }
    assert len(path.read_text().splitlines()) > 5
