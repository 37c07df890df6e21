import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from torch import nn

from cvtrain.core.artifact import ONNXRUNTIME
from cvtrain.errors import ConfigError, CvtrainError
from cvtrain.export import Onnx, export_onnx

METADATA = {"class_names": '["cat", "dog"]', "preprocess": '{"img_size": 8}', "version": "1"}
EXAMPLE = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(144, 2))
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    return model, Onnx().export(model, EXAMPLE, tmp_path_factory.mktemp("onnx"), METADATA)


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images.numpy()})[0]


def resnet18_small_stem():
    net = torchvision.models.resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return net


@pytest.mark.slow
@pytest.mark.parametrize(("build", "side"), [(resnet18_small_stem, 8), (torchvision.models.mobilenet_v3_small, 32)])
def test_a_real_network_gives_the_same_logits_at_any_batch_size(build, side, tmp_path):
    torch.manual_seed(0)
    net = build().eval()
    artifact = Onnx().export(net, torch.randn(1, 3, side, side), tmp_path, METADATA)
    for size in (1, 3, 16):
        images = torch.randn(size, 3, side, side)
        with torch.no_grad():
            expected = net(images).numpy()
        assert np.abs(run(artifact.path, images) - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


def test_the_artifact_names_its_file_runtime_and_size(exported):
    model, artifact = exported
    assert (artifact.name, artifact.path.name, artifact.runtime) == ("onnx", "model.onnx", ONNXRUNTIME)
    assert artifact.params == sum(p.numel() for p in model.parameters())
    assert artifact.macs == 4 * 3 * 9 * 36 + 144 * 2
    assert [entry.name for entry in artifact.path.parent.iterdir()] == ["model.onnx"]


def test_the_file_carries_names_metadata_and_opset(exported):
    file = onnx.load(exported[1].path)
    assert {entry.key: entry.value for entry in file.metadata_props} == METADATA
    assert ([i.name for i in file.graph.input], [o.name for o in file.graph.output]) == (["images"], ["logits"])
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [("", 20)]
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_file_tells_nothing_about_the_machine_it_was_written_on(exported):
    content = exported[1].path.read_bytes()
    assert b"stack_trace" not in content
    assert str(Path(torch.__file__).parent).encode() not in content
    assert __file__.encode() not in content


def test_without_dynamic_the_batch_is_one(tiny, tmp_path):
    path = Onnx(dynamic=False).export(tiny, EXAMPLE, tmp_path, {}).path
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert run(path, EXAMPLE).shape == (1, 2)


def test_a_model_in_training_mode_and_channels_last_is_exported_in_eval_mode_and_left_alone(tiny, tmp_path):
    tiny[1].running_mean.fill_(0.3)
    with torch.no_grad():
        expected = tiny(EXAMPLE).numpy()
    model = copy.deepcopy(tiny).train().to(memory_format=torch.channels_last)
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    export_onnx(model, EXAMPLE, tmp_path / "a.onnx", {})
    assert [module.training for module in model] == [False, True, True, True, True, True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert np.allclose(run(tmp_path / "a.onnx", EXAMPLE), expected, atol=1e-5)


def test_exporting_says_nothing(tiny, tmp_path, capfd):
    export_onnx(tiny, EXAMPLE, tmp_path / "a.onnx", {})
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize("opset", [17, 9, 0])
def test_an_opset_below_18_is_refused_with_value_range_and_fix(opset, tiny, tmp_path):
    with pytest.raises(ConfigError) as caught:
        Onnx(opset=opset)
    assert all(word in str(caught.value) for word in [f"export.onnx.opset={opset}", "18 or more", "opset=20"])
    with pytest.raises(ConfigError):
        export_onnx(tiny, EXAMPLE, tmp_path / "a.onnx", {}, opset=opset)


def test_an_opset_the_exporter_does_not_know_yet_is_refused_instead_of_written_as_another(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"opset=99: .* in opset 18 only"):
        export_onnx(tiny, EXAMPLE, tmp_path / "a.onnx", {}, opset=99)
    assert list(tmp_path.iterdir()) == []


class Noisy(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) + torch.rand_like(images[:, :, 0, 0])


def test_a_file_whose_logits_differ_from_the_model_is_refused_and_the_old_file_stands(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"old")
    with pytest.raises(CvtrainError, match="logits differ from the model's by"):
        export_onnx(Noisy(), EXAMPLE, path, {})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


class Branching(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


def test_a_model_that_cannot_be_traced_is_reported_in_three_lines(tmp_path):
    with pytest.raises(CvtrainError, match="cannot export this model") as caught:
        export_onnx(Branching(), EXAMPLE, tmp_path / "a.onnx", {})
    assert len(str(caught.value).splitlines()) <= 3
    assert list(tmp_path.iterdir()) == []


def test_weights_too_large_for_one_file_go_beside_it_under_its_name(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("cvtrain.export.onnx._ONE_FILE_BYTES", 0)
    path = Onnx().export(tiny, EXAMPLE, tmp_path, METADATA).path
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    with torch.no_grad():
        assert np.allclose(run(path, EXAMPLE), tiny(EXAMPLE).numpy(), atol=1e-5)
