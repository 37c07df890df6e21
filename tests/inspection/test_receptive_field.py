"""The receptive field: the closed form on chains, published figures, and gradients wherever ways meet."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from cvtrain.inspection.model_summary import trace
from cvtrain.model import LeNet5

pytestmark = pytest.mark.usefixtures("one_thread")


def seen(model, size, channels=3):
    """Return (field, stride) of each layer by path, the last call of it; None for the whole picture or no place."""
    return {
        layer.path: (layer.field.size[0], None if layer.stride is None else layer.stride[0])
        for layer in trace(model, (channels, size, size))
    }


def closed_form(chain):
    """Return field and stride of each (kernel, stride, dilation): Araujo et al., Distill 2019, equation 2 and 1."""
    field, jump, found = 1, 1, []
    for kernel, stride, dilation in chain:
        field, jump = field + (kernel - 1) * dilation * jump, jump * stride
        found.append((field, jump))
    return found


CHAINS = {
    "plain": [(3, 1, 1)] * 4,
    "strides": [(7, 2, 1), (3, 2, 1), (3, 1, 1), (2, 2, 1)],
    "dilations": [(3, 1, 1), (3, 1, 2), (3, 1, 4), (3, 1, 8)],
    "strided dilations": [(5, 2, 1), (3, 1, 3), (3, 2, 2), (1, 1, 1)],
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_chain_of_convolutions_has_the_field_of_the_closed_form(chain, padded):
    model = nn.Sequential(
        *(
            nn.Conv2d(3 if i == 0 else 4, 4, k, s, padding=(k - 1) * d // 2 if padded else 0, dilation=d)
            for i, (k, s, d) in enumerate(chain)
        )
    )
    assert list(seen(model, 80).values()) == closed_form(chain)


def test_lenet_sees_sixteen_pixels_before_its_linear_layers_and_then_everything():
    found = seen(LeNet5(10, 1, 28), 28, channels=1)
    chain = closed_form([(5, 1, 1), (2, 2, 1), (5, 1, 1), (2, 2, 1)])
    assert [found[f"features.{i}"] for i in (0, 2, 3, 5)] == chain
    assert chain[-1] == (16, 4)
    assert found["head.1"] == (None, None)


@pytest.mark.parametrize(
    ("name", "last", "field", "size"),
    [
        # Araujo et al., Distill 2019, table: alexnet_v2, vgg_16; the ResNet by the closed form along its longest way.
        ("alexnet", "features.12", 195, 224),
        ("vgg16", "features.30", 212, 224),
        ("resnet18", "layer4.1.relu", 435, 224),
    ],
)
def test_published_fields(name, last, field, size):
    with torch.device("meta"):
        model = models.get_model(name, weights=None)
    assert seen(model, size)[last] == (field, 32)


def test_heights_and_widths_have_fields_of_their_own():
    model = nn.Conv2d(1, 1, (3, 5), stride=(1, 2), padding="valid")
    (layer,) = trace(model, (1, 9, 9))
    assert (layer.field.size, layer.stride, layer.shape) == ((3, 5), (1, 2), (1, 7, 3))


class Lambda(nn.Module):
    """A function as a network, with two layers to use."""

    def __init__(self, function):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 5, padding=2, stride=2)
        self.mix, self.last = nn.Linear(2, 2), nn.Identity()
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def positive(model):
    """Make every gradient positive: equal weights, no saturation, no place that wins over others."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.Sigmoid)):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.MaxPool2d):
                pool = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(module, name, pool)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1 / max(1, parameter[0].numel()))
    return model.double().eval()


def support(output, images, place):
    """Return first and last row of the picture whose gradient of `output`, at `place` of the diagonal, is not 0."""
    images.grad = None
    output[0, :, place, place].sum().backward(retain_graph=True)
    rows = images.grad[0].abs().sum((0, 2)).nonzero().flatten()
    return int(rows.min()), int(rows.max())


WAYS = {
    "sum": lambda m, x: x + m.one(x),
    "sum of strides": lambda m, x: m.two(x) + F.max_pool2d(x, 2) + F.avg_pool2d(m.one(x), 2),
    "parts": lambda m, x: torch.cat([m.one(m.one(x[:, :1].expand(-1, 2, -1, -1))), x[:, 1:]], 1),
    "channels last": lambda m, x: m.mix(m.one(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "shuffled channels": lambda m, x: m.one(x).view(1, 2, 1, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "tokens": lambda m, x: m.mix(m.two(x).flatten(2).mT).mT.unflatten(2, (8, 8)),
    "padded and cut": lambda m, x: m.one(F.pad(x, (3, 0, 3, 0)))[:, :, 2:-1, 2:-1],
    "every second": lambda m, x: torch.cat([m.one(x)[..., 0::2, 0::2], x[..., 1::2, 1::2]], 1),
    "pixels to channels": lambda m, x: m.one(F.pixel_unshuffle(x, 2)[:, 1:3]),
    "enlarged": lambda m, x: m.one(x) + F.interpolate(m.two(x), scale_factor=2.0),
    "bilinear": lambda m, x: m.one(x) + F.interpolate(m.two(x), size=16, mode="bilinear"),
    "uneven bins": lambda m, x: F.adaptive_avg_pool2d(m.one(x), 6),
    "even bins": lambda m, x: F.adaptive_avg_pool2d(m.one(x), 4),
    "same": lambda m, x: F.conv2d(x, m.one.weight, padding="same", dilation=2),
    "in place": lambda m, x: m.one(x).add_(x).relu_(),
    "stacked": lambda m, x: torch.stack([x, m.one(x)], 2).mean(2),
    "chunks": lambda m, x: m.one(x).chunk(2, 1)[0] * x,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_where_ways_meet_the_field_is_that_of_the_gradients(way):
    model = positive(Lambda(way))
    images = torch.rand(1, 2, 16, 16, dtype=torch.float64, requires_grad=True)
    output = model(images)
    (layer,) = [layer for layer in trace_of_whole(model, 16) if layer.path == "whole"]
    span = layer.field.spans[0]
    assert layer.field.stride is not None
    assert span.count == output.shape[2]
    lows, highs = [], []
    for place in range(output.shape[2]):
        first, last = support(output, images, place)
        low, high = span.first + place * span.jump, span.last + place * span.jump
        assert first >= math.floor(max(0, low)), place
        assert last <= math.ceil(min(15, high)), place
        lows.append(first == max(0, low))
        highs.append(last == min(15, high))
    assert any(lows), "tight"
    assert any(highs), "tight"


class Whole(nn.Module):
    """Gives what a network returns a name of its own: a product with a weight that is 1."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x):
            return x * self.one

    def __init__(self, model):
        super().__init__()
        self.model, self.whole = model, self.One()

    def forward(self, x):
        return self.whole(self.model(x))


def trace_of_whole(model, size):
    return trace(Whole(model), (2, size, size))


GLOBAL = {
    "mean": lambda m, x: x + m.one(x).mean((2, 3), keepdim=True),
    "gate": lambda m, x: x * torch.sigmoid(F.adaptive_avg_pool2d(m.one(x), 1)),
    "attention": lambda m, x: F.scaled_dot_product_attention(*[m.mix(x.flatten(2).mT)] * 3).mT.view(x.shape),
    "products": lambda m, x: (x.flatten(2).mT @ x.flatten(2)).softmax(-1).mT.matmul(x.flatten(2).mT).mT.view(x.shape),
    "group norm": lambda m, x: F.group_norm(x, 1),
    "spectrum": lambda m, x: torch.fft.ifft2(torch.fft.fft2(x)).real,
    "shift": lambda m, x: x.roll(3, 2).roll(3, 3),
}


@pytest.mark.parametrize("way", GLOBAL.values(), ids=GLOBAL)
def test_what_mixes_all_places_sees_the_whole_picture_and_places_stay(way):
    (layer,) = [layer for layer in trace_of_whole(positive(Lambda(way)), 16) if layer.path == "whole"]
    assert layer.field.size == (None, None)
    assert layer.stride == (1, 1)


def test_squares_of_pixels_made_channels_by_hand_lie_as_far_apart_as_they_are_large():
    def to_depth(model, x):
        squares = x.view(1, 2, 4, 4, 4, 4).permute(0, 3, 5, 1, 2, 4).reshape(1, 32, 4, 4)
        return F.conv2d(squares, torch.ones(2, 32, 1, 1, dtype=x.dtype))

    (layer,) = [layer for layer in trace_of_whole(positive(Lambda(to_depth)), 16) if layer.path == "whole"]
    assert layer.stride == (4, 4)


NETWORKS = [
    ("resnet18", "layer2", 99),
    ("mobilenet_v2", "features.10", None),
    ("shufflenet_v2_x0_5", "stage3.1", None),
    pytest.param("googlenet", "inception4a", None, marks=pytest.mark.slow),
    pytest.param("densenet121", "features.denseblock1", None, marks=pytest.mark.slow),
    pytest.param("squeezenet1_0", "features.9", None, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "path", "size"), NETWORKS)
def test_a_networks_field_is_where_the_gradients_of_a_central_unit_are(name, path, size):
    side = 192
    model = positive(models.get_model(name, weights=None, num_classes=2))
    results = []
    model.get_submodule(path).register_forward_hook(lambda _module, _inputs, output: results.append(output))
    images = torch.ones(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    model(images)
    output = results[0]
    layers = [layer for layer in trace(model, (3, side, side)) if layer.path.startswith(path)]
    layer = [layer for layer in layers if layer.shape[1:] == output.shape[2:]][-1]
    if size is not None:
        assert layer.field.size == (size, size)
    place = output.shape[2] // 2
    span = layer.field.spans[0]
    low, high = span.first + place * span.jump, span.last + place * span.jump
    assert support(output, images, place) == (max(0, low), min(side - 1, high))
    assert high - low + 1 < side, "the picture is larger than the field"


@pytest.mark.parametrize(
    ("name", "before", "size", "behind"),
    [
        ("vit_b_16", "conv_proj", 16, "encoder.layers.encoder_layer_0.self_attention"),
        ("mobilenet_v3_small", "features.0.2", 3, "features.1.block.1.activation"),
        ("swin_t", "features.0.0", 4, "features.1.0.attn"),
    ],
)
def test_attention_and_gates_see_the_whole_picture_and_the_stride_goes_on(name, before, size, behind):
    with torch.device("meta"):
        model = models.get_model(name, weights=None)
    found = seen(model, 224)
    assert found[before][0] == size
    assert found[behind][0] is None
    assert max(stride for _, stride in found.values() if stride) == (16 if name == "vit_b_16" else 32)
