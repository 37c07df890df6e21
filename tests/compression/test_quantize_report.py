"""The report of each layer's error, and leaving the worst layers in float."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from cvtrain.compression import PtqStatic
from cvtrain.compression.quantize import OnnxModule
from cvtrain.compression.quantize_report import weight_error

PICTURES = torch.randn((20, 1, 8, 8), generator=torch.Generator().manual_seed(7))


def uint8(values, low, high):
    """Independent of the code under test: what stays of float64 `values` in 256 steps that hold 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero = round(-low / scale)
    return (np.clip(np.round(values / scale) + zero, 0, 255) - zero) * scale


def int8(weight):
    scale = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True) / 127
    return np.round(weight / scale) * scale


def decibels(exact, rounded):
    return 10 * np.log10((exact**2).sum() / ((exact - rounded) ** 2).sum())


@pytest.fixture
def two_layers():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)).eval()
    with torch.no_grad():
        net[0].weight[0] *= 20
    return net


def test_the_report_of_a_weight_is_what_its_numbers_say():
    weight = np.array([[1.0, -0.5, 0.26], [10.0, 4.1, 0.0]], dtype=np.float32)
    scale = np.array([1 / 4, 2.0], dtype=np.float32)
    numbers = np.array([[4, -2, 1], [5, 2, 0]], dtype=np.int8)
    error = weight_error(weight, numbers, scale, np.zeros(2, np.int8), axis=0)
    assert (error.weight_scale_min, error.weight_scale_max, error.weight_zero_point) == (0.25, 2.0, 0)
    assert error.weight_max_error == pytest.approx(0.1)
    assert error.weight_mean_error == pytest.approx((0.01 + 0.1) / 6, rel=1e-5)
    power = (weight.astype(float) ** 2).sum()
    assert error.weight_snr_db == pytest.approx(10 * np.log10(power / (0.01**2 + 0.1**2)), abs=1e-3)


def test_each_layer_has_a_row_with_its_scales_and_the_error_that_is_its_own(two_layers, make_context):
    context = make_context(batches=[PICTURES[:8]])
    rows = PtqStatic(calibration_samples=8).apply(two_layers, "int8", context).layers
    assert [(row["layer"], row["kind"], row["int8"]) for row in rows] == [("0", "Conv", True), ("3", "Gemm", True)]
    with torch.no_grad():
        hidden = two_layers[:3](PICTURES[:8])
        answers = two_layers[3](hidden)
    conv, linear = (two_layers[i].weight.detach().double().numpy() for i in (0, 3))
    for row, weight in ((rows[0], conv), (rows[1], linear)):
        scales = np.abs(weight).max(axis=tuple(range(1, weight.ndim))) / 127
        assert row["weight_scale_min"] == pytest.approx(scales.min(), rel=1e-5)
        assert row["weight_scale_max"] == pytest.approx(scales.max(), rel=1e-5)
        assert row["weight_zero_point"] == 0
        assert row["weight_mean_error"] == pytest.approx(np.abs(weight - int8(weight)).mean(), rel=1e-3)
        assert row["weight_max_error"] == pytest.approx(np.abs(weight - int8(weight)).max(), rel=1e-3)
        assert row["weight_snr_db"] == pytest.approx(decibels(weight, int8(weight)), abs=0.01)
    # The second layer gets the float network's activations, rounded, not the first one's errors.
    exact, inputs = answers.double().numpy(), hidden.double().numpy()
    bias = two_layers[3].bias.detach().double().numpy()
    own = uint8(inputs, 0.0, inputs.max()) @ int8(linear).T + bias
    assert rows[1]["output_snr_db"] == pytest.approx(decibels(exact, uint8(own, exact.min(), exact.max())), abs=0.1)
    assert rows[1]["output_scale"] == pytest.approx((exact.max() - exact.min()) / 255, rel=1e-4)
    assert rows[1]["output_zero_point"] == round(-exact.min() / ((exact.max() - exact.min()) / 255))
    assert rows[0]["output_zero_point"] == 0  # behind it stands a ReLU


def test_rows_of_layers_with_and_without_weights_have_the_same_columns(make_context):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.head = nn.Linear(4, 3)

        def forward(self, images):
            values = self.first(images)
            values = nn.functional.hardswish(values + self.second(values).relu())
            return self.head(values.mean((2, 3)))

    torch.manual_seed(0)
    rows = PtqStatic(calibration_samples=16).apply(Residual().eval(), "int8", make_context()).layers
    assert {"first", "second", "head"} < {row["layer"] for row in rows}
    assert not {"HardSwish", "ReduceMean"} & {row["kind"] for row in rows}  # in float, whatever is asked for
    (add,) = [row for row in rows if row["kind"] == "Add"]
    assert len({tuple(row) for row in rows}) == 1
    assert add["weight_snr_db"] == ""
    assert 20 < add["output_snr_db"] < 80


def quantized_weights(path):
    return sum(
        entry.data_type == TensorProto.INT8 and len(entry.dims) > 1 for entry in onnx.load(path).graph.initializer
    )


@pytest.fixture
def many_layers():
    """Six convolutions; an outlier that is multiplied with zeros spoils the weights of one, rounded per tensor."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(1 if i == 0 else 6, 6, 3, padding=1) for i in range(6)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(384, 3)).eval()
    with torch.no_grad():
        net[2].weight[0], net[2].bias[0] = 0.0, 0.0
        net[3].weight[0, 0, 0, 0] = 100.0
    return net


class Judge:
    """Accuracy that only depends on how far the answers are from the float network's."""

    def __init__(self, net, allowed):
        with torch.no_grad():
            self.exact = net(PICTURES)
        self.allowed, self.calls = allowed, 0

    def __call__(self, candidate):
        self.calls += 1
        with torch.no_grad():
            error = (candidate(PICTURES) - self.exact).norm() / self.exact.norm()
        return 0.9 if error < self.allowed else 0.5


def test_auto_skip_leaves_the_worst_layer_in_float_until_the_drop_is_allowed(many_layers, make_context):
    step = PtqStatic(calibration_samples=16, per_channel=False, auto_skip=True)
    judge = Judge(many_layers, allowed=10.0)
    result = step.apply(many_layers, "int8", make_context(evaluate=judge))
    assert judge.calls == 2
    assert all(row["int8"] for row in result.layers)
    assert "0 of 7 layers left in float, accuracy on val +0.00 points" in result.artifacts[-1].note
    assert quantized_weights(result.artifacts[-1].path) == 7

    judge = Judge(many_layers, allowed=0.05)
    result = step.apply(many_layers, "int8", make_context(evaluate=judge))
    skipped = [row["layer"] for row in result.layers if not row["int8"]]
    assert "3" in skipped
    assert "left in float (3" in result.artifacts[-1].note
    assert quantized_weights(result.artifacts[-1].path) == 7 - len(skipped)
    assert judge(OnnxModule(result.artifacts[-1].path)) == 0.9


def test_auto_skip_gives_up_at_half_of_the_layers_and_says_so(many_layers, make_context):
    answers = iter([0.9, 0.5, 0.6, 0.7, 0.8])
    step = PtqStatic(calibration_samples=16, auto_skip=True, max_drop=0.05)
    result = step.apply(many_layers, "int8", make_context(evaluate=lambda _: next(answers)))
    assert sum(not row["int8"] for row in result.layers) == 3
    assert "accuracy on val -10.00 points, more than max_drop=0.05 allows" in result.artifacts[-1].note
    assert list(answers) == []


def test_a_file_can_be_evaluated_as_if_it_were_a_network(model, make_context):
    path = PtqStatic(calibration_samples=16).apply(model, "int8", make_context()).artifacts[-1].path
    runs = OnnxModule(path).eval().to(memory_format=torch.channels_last)
    answers = runs(PICTURES.to(memory_format=torch.channels_last))
    assert (answers.shape, answers.dtype) == ((20, 3), torch.float32)
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(answers, model(PICTURES)).min() > 0.99
    assert list(runs.parameters()) == []
