import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization.quant_utils import QuantType, compute_scale_zp, quantize_data
from torch import nn

from cvtrain.compression import PtqStatic, Qat
from cvtrain.compression.fake_quant import RoundedInput, RoundedWeight, attach, plain_state
from cvtrain.compression.quantize import OnnxModule
from cvtrain.errors import ConfigError


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("reduced", "largest"), [(False, 127), (True, 64)])
def test_a_rounded_weight_is_what_onnx_runtime_makes_of_it(reduced, largest):
    weight = noise(5, 3, 3, 3)
    weight[4] = 0
    rounded = RoundedWeight(0, largest)(weight)
    for channel, values in zip(rounded, weight, strict=True):
        zero_point, scale, numbers = quantize_data(
            values.numpy().ravel(), QuantType.QInt8.tensor_type, symmetric=True, reduce_range=reduced
        )
        expected = (numbers.astype(np.float32) - np.float32(zero_point)) * scale
        np.testing.assert_allclose(channel.numpy().ravel(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(rounded[4], weight[4])


@pytest.mark.parametrize(("low", "high"), [(-1.5, 3.0), (0.25, 2.0), (-2.0, -1.0), (0.0, 0.0)])
def test_a_rounded_input_has_the_scale_and_zero_point_of_onnx_runtime(low, high):
    values = torch.linspace(low, high, 50)
    rounds = RoundedInput()
    rounded = rounds(values)
    zero_point, scale = compute_scale_zp(np.float32(low), np.float32(high), np.uint8(0), np.uint8(255))
    own_scale, own_zero_point = rounds.scale_and_zero_point()
    assert own_scale.item() == pytest.approx(float(scale), rel=1e-6)
    assert own_zero_point.item() == int(zero_point)
    numbers = np.clip(np.round(values.numpy() / scale) + zero_point, 0, 255)
    np.testing.assert_allclose(rounded.numpy(), (numbers - zero_point) * scale, atol=float(scale) * 1e-3)


def test_ranges_grow_at_once_shrink_slowly_and_rest_in_evaluation():
    rounds = RoundedInput()
    for low, high in ((-1.0, 1.0), (-0.5, 3.0), (-0.5, 1.0)):
        rounds(torch.tensor([low, high]))
    expected = (-0.5 - 0.5 * 0.99**2, 1 + 2 * 0.99)
    assert (rounds.low.item(), rounds.high.item()) == pytest.approx(expected)
    rounds.eval()
    clipped = rounds(torch.tensor([-100.0, 100.0]))
    assert (rounds.low.item(), rounds.high.item()) == pytest.approx(expected)
    assert clipped.tolist() == pytest.approx(expected, abs=0.01)


def test_gradients_pass_rounding_and_stop_outside_of_the_range():
    weight = noise(4, 3).requires_grad_()
    (RoundedWeight(0, 127)(weight) * torch.arange(3.0)).sum().backward()
    assert torch.equal(weight.grad, torch.arange(3.0).expand(4, 3))
    rounds = RoundedInput()
    rounds(torch.tensor([-1.0, 1.0]))
    values = torch.tensor([-5.0, -0.5, 0.5, 5.0], requires_grad=True)
    rounds.eval()(values).sum().backward()
    assert values.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU(inplace=True))
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        tokens = self.up(self.stem(images)).flatten(2).transpose(1, 2)
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def test_what_is_left_behind_training_are_the_plain_models_parameters():
    torch.manual_seed(0)
    net = Everything()
    before = net.state_dict()
    rounding = copy.deepcopy(net)
    attach(rounding)
    rounded = {name for name, _ in rounding.named_parameters() if "parametrizations" in name}
    assert rounded == {
        *("stem.0.parametrizations.weight.original", "up.parametrizations.weight.original"),
        *("attention.parametrizations.in_proj_weight.original", "attention.out_proj.parametrizations.weight.original"),
        "head.parametrizations.weight.original",
    }
    after = plain_state(rounding)
    assert set(after) == set(before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    net.load_state_dict(after)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_rounding_model_trains_channels_last_under_autocast_and_its_copies_are_independent(precision):
    torch.manual_seed(0)
    rounding = Everything()
    attach(rounding)
    rounding = rounding.to(memory_format=torch.channels_last).train()
    average = copy.deepcopy(rounding).eval().requires_grad_(False)
    weight = average.stem[0].parametrizations.weight.original.clone()
    images = noise(4, 1, 4, 4).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(rounding.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        loss = nn.functional.cross_entropy(rounding(images), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rounding.parameters())
    assert rounding.head.parametrizations.weight.original.grad.abs().sum() > 0
    optimizer.step()
    assert torch.equal(average.stem[0].parametrizations.weight.original, weight)
    assert average.stem[0].input_range.low.isnan()
    average.load_state_dict(rounding.state_dict())
    assert torch.equal(average.eval()(images), rounding.eval()(images))


def test_rounding_before_batch_norm_is_rounding_behind_folding_it(make_context):
    """So training need not fold: the trained network with rounded weights computes what the file does."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 3))
    net[1].running_mean.normal_(), net[1].running_var.uniform_(0.1, 9.0), net[1].weight.data.normal_()
    net.eval()
    path = Qat(finetune_epochs=0, calibration_samples=16).apply(net, "qat", make_context()).artifacts[-1].path
    constants = {entry.name: numpy_helper.to_array(entry) for entry in onnx.load(path).graph.initializer}
    stored = next(v for v in constants.values() if v.dtype == np.int8 and v.shape == (6, 1, 3, 3)).astype(int)
    weight = net[0].weight.detach()
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    numbers = (RoundedWeight(0, 127)(weight) / scale).round().int().numpy()
    signs = np.sign(net[1].weight.detach().numpy()).astype(int).reshape(6, 1, 1, 1)
    assert np.abs(stored - numbers * signs).max() <= 1
    assert (stored == numbers * signs).mean() > 0.9


def test_zero_epochs_give_what_static_quantization_gives(model, make_context):
    context = make_context()
    qat = Qat(finetune_epochs=0, calibration_samples=32).apply(model, "qat", context)
    ptq = PtqStatic(calibration_samples=32).apply(model, "int8", context)
    assert qat.artifacts[0].path.read_bytes() == ptq.artifacts[0].path.read_bytes()
    assert qat.layers == ptq.layers


def test_the_artifact_is_a_side_product_and_the_callers_model_is_left_alone(model, make_context, tmp_path, capfd):
    before = copy.deepcopy(model.state_dict())
    seen = []
    context = make_context(finetune=lambda net, *given: seen.append(given))
    result = Qat(finetune_epochs=3, finetune_lr=0.2, calibration_samples=32).apply(model, "pruned+qat", context)
    assert seen == [(3, 0.2, None)]
    assert result.model is None
    (artifact,) = result.artifacts
    assert (artifact.name, artifact.runtime, artifact.exact) == ("pruned+qat", "onnxruntime", False)
    assert [path.name for path in tmp_path.iterdir()] == ["pruned_qat.onnx"]
    assert artifact.note == ("static INT8 behind 3 epochs of training for it, minmax ranges of 32 training pictures")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert capfd.readouterr() == ("", "")


def accuracy(net, images, labels):
    with torch.no_grad():
        return (net(images).argmax(1) == labels).double().mean().item()


def test_training_with_rounding_regains_what_plain_quantization_loses(make_context):
    """Weights that only ever see zeros take up the range of the others, as unused channels of real networks do."""
    patterns = 0.4 * noise(3, 64, seed=1)
    labels = torch.randint(0, 3, (600,), generator=torch.Generator().manual_seed(2))
    images = (patterns[labels] + noise(600, 64, seed=3)).reshape(600, 1, 8, 8)
    images[..., 0, 0] = 0

    def train(net, epochs, lr=0.1, teacher=None):
        optimizer = torch.optim.SGD(net.train().parameters(), lr=lr, momentum=0.9)
        for _ in range(epochs):
            for start in range(0, 600, 100):
                batch = slice(start, start + 100)
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
                optimizer.step()
        net.eval()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    train(net, 3)
    with torch.no_grad():
        net[1].weight[:, 0] = 100.0
    context = make_context(example=images[:1], batches=[images], finetune=train)
    ptq, qat = (
        OnnxModule(step.apply(net, "int8", context).artifacts[-1].path)
        for step in (PtqStatic(), Qat(finetune_epochs=4))
    )
    full = accuracy(net, images, labels)
    assert full > 0.95
    assert accuracy(ptq, images, labels) < full - 0.1
    assert accuracy(qat, images, labels) > full - 0.02


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"finetune_epochs": -1}, ["finetune_epochs=-1", "0 or more"]),
        ({"finetune_lr": 0.0}, ["finetune_lr=0.0", "above 0"]),
        ({"calibration_samples": 0}, ["calibration_samples=0", "1 or more"]),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_key_value_and_range(setting, words):
    with pytest.raises(ConfigError) as caught:
        Qat(**setting)
    assert all(word in str(caught.value) for word in ["compression.qat", *words])
