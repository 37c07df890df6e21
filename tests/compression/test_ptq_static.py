import copy
import logging

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import calibrate, shape_inference
from torch import nn

from cvtrain.compression import PtqStatic
from cvtrain.compression.quantize import calibration_batches
from cvtrain.errors import ConfigError, CvtrainError, DataError


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images.numpy()})[0]


def weight_tensors(path):
    """The INT8 initializers that feed a DequantizeLinear and are no bias, with their scales."""
    graph = onnx.load(path).graph
    constants = {entry.name: entry for entry in graph.initializer}
    return [
        (numpy_helper.to_array(constants[node.input[0]]), numpy_helper.to_array(constants[node.input[1]]))
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in constants
        and constants[node.input[0]].data_type == TensorProto.INT8
    ]


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_the_file_runs_at_any_batch_size_and_stays_close_to_the_float_model(model, make_context, method):
    artifact = PtqStatic(calibration_samples=64, method=method).apply(model, "int8", make_context()).artifacts[-1]
    for size in (1, 7, 64):
        images = torch.randn((size, 1, 8, 8), generator=torch.Generator().manual_seed(size))
        expected = model(images).detach().numpy()
        logits = run(artifact.path, images)
        assert logits.shape == (size, 3)
        error = np.abs(logits - expected).max()
        assert 0 < error < 0.1 * np.abs(expected).max()


@pytest.mark.slow
def test_a_resnet_becomes_a_quarter_of_its_size_and_keeps_its_answers(make_context):
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    net.eval()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn((16, 3, 16, 16), generator=generator)]
    context = make_context(example=torch.randn(1, 3, 16, 16), batches=batches)
    artifact = PtqStatic(calibration_samples=16).apply(net, "int8", context).artifacts[-1]
    assert artifact.path.stat().st_size < 0.27 * 4 * artifact.params
    with torch.no_grad():
        expected = net(batches[0]).numpy()
    assert np.corrcoef(run(artifact.path, batches[0]).ravel(), expected.ravel())[0, 1] > 0.99


def test_weights_are_signed_activations_unsigned_and_scales_one_for_each_channel(model, make_context):
    path = PtqStatic(calibration_samples=32).apply(model, "int8", make_context()).artifacts[-1].path
    graph = onnx.load(path).graph
    constants = {entry.name: entry for entry in graph.initializer}
    zero_points = {constants[node.input[2]].data_type for node in graph.node if node.op_type == "QuantizeLinear"}
    assert zero_points == {TensorProto.UINT8}
    shapes = sorted(scale.shape for _, scale in weight_tensors(path))
    assert shapes == [(3,), (8,), (16,)]


def test_without_per_channel_every_weight_has_one_scale(model, make_context):
    path = PtqStatic(calibration_samples=32, per_channel=False).apply(model, "int8", make_context()).artifacts[-1].path
    assert {scale.size for _, scale in weight_tensors(path)} == {1}


@pytest.mark.parametrize(("reduced", "largest"), [(False, 127), (True, 64)])
def test_reduced_range_keeps_weights_to_seven_bits(model, make_context, reduced, largest):
    path = (
        PtqStatic(calibration_samples=32, reduce_range=reduced).apply(model, "int8", make_context()).artifacts[-1].path
    )
    assert max(int(np.abs(weight.astype(int)).max()) for weight, _ in weight_tensors(path)) == largest


def test_the_artifact_is_a_side_product_and_only_its_file_is_left(model, make_context, tmp_path):
    result = PtqStatic(calibration_samples=32).apply(model, "pruned+int8", make_context())
    assert result.model is None
    (artifact,) = result.artifacts
    assert (artifact.name, artifact.runtime, artifact.exact) == ("pruned+int8", "onnxruntime", False)
    assert [path.name for path in tmp_path.iterdir()] == ["pruned_int8.onnx"]
    assert artifact.params == sum(p.numel() for p in model.parameters())
    assert artifact.macs > 0


def test_the_metadata_of_the_float_file_reaches_the_int8_file(model, make_context):
    path = PtqStatic(calibration_samples=32).apply(model, "int8", make_context()).artifacts[-1].path
    stored = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert stored["class_names"] == '["a", "b", "c"]'
    assert stored["version"] == "1"


@pytest.mark.parametrize(("asked", "used"), [(33, 33), (1000, 80)])
def test_no_more_than_the_asked_pictures_are_used_and_the_note_counts_them(model, make_context, asked, used):
    note = PtqStatic(calibration_samples=asked).apply(model, "int8", make_context()).artifacts[-1].note
    assert note == f"static INT8, minmax ranges of {used} training pictures"


def test_a_picture_behind_the_asked_number_has_no_effect(model, make_context):
    wild = torch.full((4, 1, 8, 8), 1e4)
    calm = torch.randn((40, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    context = make_context(batches=[calm, wild])
    few = PtqStatic(calibration_samples=40).apply(model, "int8", context).artifacts[-1].path.read_bytes()
    all_of_them = PtqStatic(calibration_samples=44).apply(model, "int8", context).artifacts[-1].path.read_bytes()
    calm_only = PtqStatic(calibration_samples=44).apply(model, "int8", make_context(batches=[calm])).artifacts[-1].path
    assert few == calm_only.read_bytes()
    assert few != all_of_them


def test_percentile_falls_back_to_minmax_on_a_range_without_bins_and_says_so(make_context):
    torch.manual_seed(0)
    # Activations that differ by less than 2048 steps of float32.
    flat = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    with torch.no_grad():
        flat[0].weight.mul_(1e-6)
        flat[0].bias.fill_(1.0)
    artifact = PtqStatic(calibration_samples=40, method="percentile").apply(flat, "int8", make_context()).artifacts[-1]
    assert "minmax ranges" in artifact.note
    assert "percentile calibration failed" in artifact.note
    assert run(artifact.path, torch.zeros(7, 1, 8, 8)).shape == (7, 3)


def test_a_failing_symbolic_shape_inference_is_retried_without_it(model, make_context, monkeypatch):
    original = shape_inference.quant_pre_process
    skipped = []

    def failing(*args, skip_symbolic_shape=False, **kwargs):
        skipped.append(skip_symbolic_shape)
        if not skip_symbolic_shape:
            raise Exception("Incomplete symbolic shape inference")
        return original(*args, skip_symbolic_shape=True, **kwargs)

    monkeypatch.setattr(shape_inference, "quant_pre_process", failing)
    artifact = PtqStatic(calibration_samples=32).apply(model, "int8", make_context()).artifacts[-1]
    assert skipped == [False, True]
    assert artifact.path.is_file()


def test_histograms_see_one_small_batch_at_a_time(model, make_context, monkeypatch):
    held = []
    original = calibrate.HistogramCalibrater.collect_data

    def watching(self, reader):
        original(self, Watched(reader))
        held.append(len(self.intermediate_outputs))

    class Watched:
        def __init__(self, reader):
            self.reader, self.count = reader, 0

        def get_next(self):
            fed = self.reader.get_next()
            if fed is not None:
                sizes.append(fed["images"].shape[0])
            return fed

    sizes = []
    monkeypatch.setattr(calibrate.HistogramCalibrater, "collect_data", watching)
    PtqStatic(calibration_samples=70, method="percentile").apply(model, "int8", make_context())
    assert sizes == [16, 4, 16, 4, 16, 4, 10]
    assert held == [0] * 7  # nothing is kept from one batch to the next


def test_pictures_of_many_pixels_come_in_smaller_batches():
    large = [torch.zeros(5, 1, 448, 448)]
    assert [len(batch) for batch in calibration_batches(large, 5)] == [4, 1]


def test_a_histogram_that_outgrows_memory_becomes_minmax(model, make_context, monkeypatch):
    def hungry(*_):
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(calibrate.HistogramCollector, "collect", hungry)
    artifact = PtqStatic(calibration_samples=40, method="entropy").apply(model, "int8", make_context()).artifacts[-1]
    assert (
        artifact.note == "static INT8, minmax ranges of 40 training pictures; entropy calibration failed on this model"
    )


def test_a_model_whose_channels_are_all_zero_in_places_still_runs(model, make_context):
    with torch.no_grad():
        model.features[3].weight[:5] = 0
        model.head.weight.zero_()
    artifact = PtqStatic(calibration_samples=32).apply(model, "int8", make_context()).artifacts[-1]
    assert np.isfinite(run(artifact.path, torch.randn(7, 1, 8, 8))).all()


def test_quantizing_says_nothing_and_leaves_logging_as_it_was(model, make_context, capfd, caplog):
    handlers, disabled = list(logging.getLogger().handlers), logging.root.manager.disable
    PtqStatic(calibration_samples=32, method="entropy").apply(model, "int8", make_context())
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []
    assert (list(logging.getLogger().handlers), logging.root.manager.disable) == (handlers, disabled)


def test_the_callers_model_is_left_alone(model, make_context):
    before = copy.deepcopy(model.state_dict())
    PtqStatic(calibration_samples=32).apply(model, "int8", make_context())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_calibration_picture_is_a_data_error(model, make_context):
    with pytest.raises(DataError, match="no training picture"):
        PtqStatic().apply(model, "int8", make_context(batches=[]))


def test_a_model_onnx_runtime_cannot_quantize_is_reported_in_words_and_leaves_nothing(make_context, model, tmp_path):
    context = make_context()
    object.__setattr__(context, "export_onnx", lambda _, path: path.write_bytes(b"not onnx"))
    with pytest.raises(CvtrainError, match="could not quantize this model"):
        PtqStatic().apply(model, "int8", context)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"calibration_samples": 0}, ["calibration_samples=0", "1 or more"]),
        ({"method": "percentil"}, ["method=percentil", "did you mean 'percentile'", "minmax"]),
        ({"max_drop": 5}, ["max_drop=5", "0 to 1"]),
        ({"max_drop": None}, ["max_drop=None", "0 to 1"]),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_key_value_and_range(setting, words):
    with pytest.raises(ConfigError) as caught:
        PtqStatic(**setting)
    assert all(word in str(caught.value) for word in ["compression.ptq_static", *words])
