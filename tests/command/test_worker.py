"""Networks of PyTorch rebuilt from a file, in this process and in a child."""

import contextlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from teacher_file import DIGITS, PREPROCESS, write_teacher

from cvtrain.command.deployed import load_file as load_deployed
from cvtrain.command.worker import in_process, isolated
from cvtrain.core.artifact import Artifact
from cvtrain.core.weights import save_weights
from cvtrain.errors import ConfigError, WeightsError
from cvtrain.evaluation import running
from cvtrain.model import SimpleCNN

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), dtype=np.uint8)
CPU = torch.device("cpu")
OWN = """
import torch
from torch import nn
class Own(nn.Module):
    def __init__(self, num_classes, in_channels, img_size):
        super().__init__()
        self.layer = nn.Linear(in_channels * img_size**2, num_classes)
    def forward(self, images):
        return self.layer(images.flatten(1)) + torch.get_num_threads()
"""


def artifact(path):
    return Artifact("fp32", path, "torch", 0, 0)


def test_a_network_answers_in_this_process_as_it_did_before_it_was_saved(tmp_path):
    path = write_teacher(tmp_path / "model.safetensors")
    network = SimpleCNN(10, 1, 8, (6, 8)).eval()
    network.load_state_dict(load_file(path))
    with contextlib.closing(in_process(1)(artifact(path))) as worker, torch.no_grad():
        given = worker.run(IMAGES)
        assert np.allclose(given, network(PREPROCESS(torch.from_numpy(IMAGES))).numpy(), atol=1e-6)
        assert worker.memory() != worker.memory()
        assert json.loads(worker.metadata["class_names"]) == DIGITS


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A file whose network comes from a package in the current folder, and adds its number of threads."""
    (tmp_path / "mynets.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    from mynets import Own

    metadata = {
        "class_names": json.dumps(["a", "b"]),
        "preprocess": json.dumps(PREPROCESS.to_dict()),
        "model": json.dumps({"_target_": "mynets.Own"}),
    }
    network = Own(2, 1, 8)
    torch.nn.init.zeros_(network.layer.weight)
    torch.nn.init.zeros_(network.layer.bias)
    save_weights(network, tmp_path / "own.safetensors", metadata)
    return artifact(tmp_path / "own.safetensors")


def test_threads_are_those_asked_for_until_it_is_closed_or_could_not_be_loaded(own, tmp_path):
    before = torch.get_num_threads()
    chosen = 2 if before == 1 else 1
    with contextlib.closing(in_process(chosen, ["mynets"])(own)) as worker:
        assert worker.run(IMAGES).tolist() == [[chosen] * 2] * 3
    assert torch.get_num_threads() == before
    with pytest.raises(WeightsError, match="no file at"):
        in_process(chosen)(artifact(tmp_path / "missing.safetensors"))
    with pytest.raises(ConfigError, match="mynets"):
        in_process(chosen)(own)
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_children_rebuild_networks_of_this_package_and_of_trusted_ones_only(own, tmp_path, capfd):
    path = write_teacher(tmp_path / "model.safetensors")
    artifacts = [artifact(path), own]
    with running(artifacts, isolated(1, ["mynets"])) as workers, running([own], isolated(1)) as (refused,):
        with contextlib.closing(in_process(1)(artifacts[0])) as here:
            assert np.allclose(workers[0].run(IMAGES), here.run(IMAGES), atol=1e-6)
        assert workers[1].run(IMAGES).tolist() == [[1, 1]] * 3
        assert 0 < workers[0].memory() < 150
        assert min(workers[0].time(2, 3)) > 0
        with pytest.raises(ConfigError, match=r"artifact 'fp32': .*mynets"):
            refused.run(IMAGES)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_temperature_is_refused(tmp_path):
    shipped = load_deployed(write_teacher(tmp_path / "a.safetensors"), CPU, [])
    save_weights(shipped.model, tmp_path / "b.safetensors", {**shipped.metadata, "temperature": "0"})
    with pytest.raises(WeightsError, match="damaged temperature"):
        load_deployed(tmp_path / "b.safetensors", CPU, [])
