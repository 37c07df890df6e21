"""The formats beside ONNX: each is written, read back by its own runtime, and held against eager PyTorch."""

import io
import json
import logging
import sys
import zipfile

import numpy as np
import pytest
import torch
from export_parts import EXAMPLE, METADATA, logits_by_hand, pictures, tiny
from torch import nn

from cvtrain import runtime as runtimes
from cvtrain.core import runtimes as names
from cvtrain.core.weights import pickle_globals
from cvtrain.errors import ConfigError, CvtrainError
from cvtrain.export import Onnx, OpenVINO, TensorRT, TorchExport, TorchScript
from cvtrain.export.check import compare
from cvtrain.export.network import prepare
from cvtrain.export.writing import ExportError

KINDS = {
    "onnx": (Onnx, names.ONNXRUNTIME, ["net.onnx"]),
    "torch_export": (TorchExport, names.TORCH_EXPORT, ["net.pt2"]),
    "torchscript": (TorchScript, names.TORCHSCRIPT, ["net.torchscript"]),
    "openvino": (OpenVINO, names.OPENVINO, ["net.xml", "net.bin"]),
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def written(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", out)
        artifact = KINDS[kind][0]().export(tiny(), EXAMPLE, folder, METADATA, "net")
    return artifact, out.getvalue()


def load(artifact):
    return runtimes.load(artifact.runtime, artifact.path, 1)


def test_the_file_gives_the_networks_logits_at_any_batch_size(written):
    loaded = load(written[0])
    assert not loaded.embedded
    for size in (1, 3, 16):
        images = torch.randn((size, 3, 8, 8), generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            expected = tiny()(images).numpy()
        found = loaded.forward(images.numpy())
        assert found.dtype == np.float32
        assert found.shape == (size, 2)
        assert np.abs(found - expected).max() < 1e-5


def test_an_answer_is_not_overwritten_by_the_next(written):
    loaded = load(written[0])
    first = loaded.forward(EXAMPLE.numpy())
    kept = first.copy()
    loaded.forward(-EXAMPLE.numpy())
    assert np.array_equal(first, kept)


def test_the_file_carries_every_word_of_its_metadata(written):
    assert load(written[0]).metadata == METADATA


def test_the_artifact_names_its_option_file_and_runtime(kind, written):
    artifact, _ = written
    _, runtime, files = KINDS[kind]
    assert (artifact.name, artifact.path.name, artifact.runtime, artifact.exact) == (kind, files[0], runtime, True)
    assert sorted(entry.name for entry in artifact.path.parent.iterdir()) == sorted(files)
    assert (artifact.params, artifact.macs) == (sum(p.numel() for p in tiny().parameters()), 4 * 27 * 36 + 144 * 2)


def test_exporting_says_nothing_on_the_terminal_but_what_is_logged(written):
    # A log handler that another test has left may print the one line of the log.
    assert [line for line in written[1].splitlines() if "deprecated; export=torch_export" not in line] == []


def test_the_file_tells_nothing_about_the_machine_it_was_written_on(kind, written):
    if kind == "torchscript":
        pytest.skip("its debugging records name the source files by design")
    for path in written[0].path.parent.iterdir():
        content = path.read_bytes()
        assert b"site-packages" not in content, path
        assert __file__.encode() not in content, path


def test_with_its_preprocessing_inside_it_takes_pictures_and_gives_probabilities(kind, tmp_path):
    given = {**METADATA, "temperature": "0.5"}
    artifact = KINDS[kind][0](embed_preprocessing=True).export(tiny(), EXAMPLE, tmp_path, given)
    loaded = load(artifact)
    assert loaded.embedded
    assert loaded.metadata == {**given, "embedded": "true"}
    for size in (1, 5):
        images = pictures(size)
        powers = np.exp(logits_by_hand(tiny(), images) / 0.5)
        assert np.abs(loaded.forward(images) - powers / powers.sum(1, keepdims=True)).max() < 1e-5


def test_a_file_that_is_not_the_network_is_refused(kind, written):
    artifact, _ = written
    other = tiny()
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 0.05
    with pytest.raises(ExportError, match=r"at batch 1 the file's logits differ from the model's by \d"):
        compare(prepare(other, EXAMPLE, METADATA), artifact.path, KINDS[kind][1])
    with pytest.raises(ExportError, match="lost git of its metadata"):
        compare(prepare(tiny(), EXAMPLE, {**METADATA, "git": "abc"}), artifact.path, KINDS[kind][1])


class Branching(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


class Noisy(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) + torch.rand_like(images[:, :, 0, 0])


def test_a_model_that_cannot_be_exported_is_reported_in_three_lines_and_the_old_file_stands(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"old")
    with pytest.raises(CvtrainError, match="export=torch_export: PyTorch cannot export this model") as caught:
        TorchExport().export(Branching(), EXAMPLE, tmp_path, METADATA)
    assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(CvtrainError, match=r"export=torchscript: at batch 1 the file's logits differ"):
        TorchScript().export(Noisy(), EXAMPLE, tmp_path, METADATA)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


class OneByOne(nn.Module):
    """Allows a single picture only."""

    def forward(self, images):
        return images.reshape(3, -1).sum(1)[None]


def test_a_model_for_single_pictures_becomes_a_pt2_that_is_run_picture_by_picture(tmp_path, caplog):
    caplog.set_level(logging.INFO, "cvtrain")
    artifact = TorchExport().export(OneByOne(), EXAMPLE, tmp_path, METADATA)
    assert "torch_export: a batch of one, the model does not allow any batch size" in caplog.text
    images = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    assert np.allclose(load(artifact).forward(images), images.sum((2, 3)), atol=1e-4)


def test_a_pt2_holds_no_pickle_and_torchscript_holds_one_by_nature(tmp_path):
    graph = TorchExport().export(tiny(), EXAMPLE, tmp_path, METADATA).path
    assert not pickle_globals(graph)
    with zipfile.ZipFile(graph) as archive:
        contents = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    assert [name for name, content in contents.items() if content.startswith((b"\x80", b"PK"))] == []
    configs = [json.loads(content)["config"] for name, content in contents.items() if name.endswith("_config.json")]
    assert [record["use_pickle"] for config in configs for record in config.values()] == [False] * 9
    assert pickle_globals(TorchScript().export(tiny(), EXAMPLE, tmp_path, METADATA).path)


def test_torchscript_says_in_one_line_of_the_log_that_it_is_deprecated(tmp_path, caplog, recwarn):
    caplog.set_level(logging.INFO, "cvtrain")
    load(TorchScript().export(tiny(), EXAMPLE, tmp_path, METADATA))
    assert [record.message for record in caplog.records if "deprecated" in record.message] == [
        "torchscript: PyTorch calls this format deprecated; export=torch_export is its successor"
    ]
    assert [str(warning.message) for warning in recwarn] == []


def test_tensorrt_says_what_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "cvtrain.runtime.tensorrt", raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ConfigError, match=r"export=tensorrt needs the package tensorrt.*(\n.*)?cvtrain\[tensorrt\]"):
        TensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU, and PyTorch sees none here"):
        TensorRT()


def test_openvino_says_what_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "cvtrain.runtime.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"export=openvino needs the package openvino.*(\n.*)?cvtrain\[openvino\]"):
        OpenVINO()


@pytest.mark.gpu
def test_a_tensorrt_engine_gives_the_networks_logits_also_in_batches_larger_than_it_takes(tmp_path):
    pytest.importorskip("tensorrt")
    artifact = TensorRT().export(tiny(), EXAMPLE, tmp_path, METADATA, "net")
    assert (artifact.name, artifact.path.name, artifact.runtime) == ("tensorrt", "net.plan.zip", names.TENSORRT)
    loaded = load(artifact)
    assert loaded.metadata == METADATA
    for size in (1, 3, 64, 130):
        images = torch.randn((size, 3, 8, 8), generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            assert np.abs(loaded.forward(images.numpy()) - tiny()(images).numpy()).max() < 1e-4
