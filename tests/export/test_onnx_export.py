import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_parts import EXAMPLE, METADATA
from export_parts import tiny as build
from torch import nn

from cvtrain.errors import ConfigError, CvtrainError
from cvtrain.export import Onnx, export_onnx


@pytest.fixture
def tiny():
    return build()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return Onnx().export(build(), EXAMPLE, tmp_path_factory.mktemp("onnx"), METADATA).path


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images.numpy()})[0]


def test_the_file_carries_names_metadata_and_opset(exported):
    file = onnx.load(exported)
    assert {entry.key: entry.value for entry in file.metadata_props} == METADATA
    assert ([i.name for i in file.graph.input], [o.name for o in file.graph.output]) == (["images"], ["logits"])
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [("", 20)]
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_file_tells_nothing_about_the_machine_it_was_written_on(exported):
    content = exported.read_bytes()
    assert b"stack_trace" not in content
    assert str(Path(torch.__file__).parent).encode() not in content
    assert __file__.encode() not in content


def test_without_dynamic_the_batch_is_one(tiny, tmp_path):
    path = Onnx(dynamic=False).export(tiny, EXAMPLE, tmp_path, {}).path
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert run(path, EXAMPLE).shape == (1, 2)


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
    with pytest.raises(CvtrainError, match="file's logits differ from the model's by"):
        export_onnx(Noisy(), EXAMPLE, path, {})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


class Branching(nn.Module):
    """Cannot be exported as a graph; a trace keeps the branch of the picture it saw."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, images):
        return images.mean((2, 3)) if images.std() > self.limit else images.amax((2, 3))


def test_when_both_exporters_fail_the_error_of_each_is_told_in_three_lines(tmp_path):
    with pytest.raises(
        CvtrainError
    ) as caught:  # the example's deviation is 1, that of the pictures to compare with 1.4
        export_onnx(Branching(1.2), EXAMPLE, tmp_path / "a.onnx", {})
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("export=onnx: with dynamo=True PyTorch cannot export this model (")
    assert lines[1].startswith("  and with dynamo=False at batch 1 the file's logits differ from the model's by ")
    assert lines[2] == "Leave out onnx and what needs it, or choose another model."
    assert list(tmp_path.iterdir()) == []


def test_what_the_exporter_cannot_write_the_older_one_writes_and_the_log_says_so_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, "cvtrain")
    model = Branching(0.1)
    artifact = Onnx().export(model, EXAMPLE, tmp_path, METADATA, "pruned")
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("onnx: PyTorch cannot export this model (")
    assert line.endswith("; trying PyTorch's older exporter (dynamo=False)")
    assert artifact.note == "written by PyTorch's older exporter (dynamo=False)"
    assert [path.name for path in tmp_path.iterdir()] == ["pruned.onnx"]
    file = onnx.load(artifact.path)
    assert {entry.key: entry.value for entry in file.metadata_props} == METADATA
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [("", 20)]
    images = EXAMPLE.repeat(5, 1, 1, 1) + torch.arange(5.0).view(5, 1, 1, 1)
    assert np.allclose(run(artifact.path, images), model(images).numpy(), atol=1e-5)
    with pytest.raises(CvtrainError, match="with dynamo=False opset 21 is not possible, only up to 20"):
        Onnx(opset=21).export(model, EXAMPLE, tmp_path, METADATA)


def test_a_caller_whose_proof_refused_the_file_can_have_the_older_exporters(tiny, tmp_path):
    first = Onnx().export(tiny, EXAMPLE, tmp_path, METADATA)
    nodes = [node.name for node in onnx.load(first.path).graph.node]
    second = Onnx().retry(tiny, EXAMPLE, tmp_path, METADATA)
    assert (second.name, second.path, first.note) == (first.name, first.path, "")
    assert second.note == "written by PyTorch's older exporter (dynamo=False)"
    assert [node.name for node in onnx.load(second.path).graph.node] != nodes
    with torch.no_grad():
        assert np.allclose(run(second.path, EXAMPLE), tiny(EXAMPLE).numpy(), atol=1e-5)


@pytest.mark.parametrize("way", ["export", "retry"])
def test_weights_too_large_for_one_file_go_beside_it_under_its_name(way, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("cvtrain.export.onnx._ONE_FILE_BYTES", 0)
    path = getattr(Onnx(), way)(tiny, EXAMPLE, tmp_path, METADATA).path
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    with torch.no_grad():
        assert np.allclose(run(path, EXAMPLE), tiny(EXAMPLE).numpy(), atol=1e-5)
