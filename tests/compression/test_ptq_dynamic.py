import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from cvtrain.compression import PtqDynamic
from cvtrain.errors import CvtrainError


class Attentive(nn.Module):
    """Patches, attention, an MLP and a head: what vit_b_16 is made of."""

    def __init__(self, width=24):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 3)

    def forward(self, images):
        tokens = self.norm(self.stem(images).flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head((tokens + self.mlp(tokens)).mean(1))


@pytest.fixture
def attentive():
    torch.manual_seed(0)
    return Attentive().eval()


def run(path, images):
    return onnxruntime.InferenceSession(str(path)).run(["logits"], {"images": images.numpy()})[0]


def test_every_linear_layer_is_int8_attentions_projections_too_and_answers_stay(attentive, make_context, tmp_path):
    example = torch.randn((1, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    result = PtqDynamic().apply(attentive, "int8d", make_context(example=example))
    (artifact,) = result.artifacts
    assert result.model is None
    assert (artifact.name, artifact.runtime, artifact.exact) == ("int8d", "onnxruntime", False)
    assert [path.name for path in tmp_path.iterdir()] == ["int8d.onnx"]
    graph = onnx.load(artifact.path).graph
    large = [entry for entry in graph.initializer if entry.data_type == onnx.TensorProto.FLOAT and len(entry.dims) == 2]
    assert large == []
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == len(result.layers)
    weights = [attentive.attention.in_proj_weight, *(m.weight for m in attentive.modules() if isinstance(m, nn.Linear))]
    share = sum(w.numel() for w in weights) / artifact.params
    assert artifact.note == f"dynamic INT8 of 5 linear layers with {share:.0%} of the weights, the rest is float"
    for size in (1, 7):
        images = torch.randn((size, 3, 16, 16), generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            expected = attentive(images).numpy()
        error = np.abs(run(artifact.path, images) - expected).max() / np.abs(expected).max()
        assert 0 < error < 0.05


def test_the_report_compares_each_weight_with_its_own_numbers(attentive, make_context):
    result = PtqDynamic().apply(attentive, "int8d", make_context(example=torch.randn(1, 3, 16, 16)))
    rows = {row["layer"]: row for row in result.layers}
    assert set(rows) == {"attention.in_proj", "attention.out_proj", "mlp.0", "mlp.2", "head"}
    row = rows["mlp.0"]
    weight = attentive.mlp[0].weight.detach().double().numpy()
    scale = np.abs(weight).max(1, keepdims=True) / 127
    error = np.abs(np.round(weight / scale) * scale - weight)
    assert row["weight_mean_error"] == pytest.approx(error.mean(), rel=1e-3)
    assert row["weight_max_error"] == pytest.approx(error.max(), rel=1e-3)
    assert row["weight_scale_max"] == pytest.approx(scale.max(), rel=1e-5)
    assert row["output_scale"] == ""  # found anew for each batch


@pytest.mark.parametrize(
    ("setting", "scales", "largest"), [({}, 3, 127), ({"per_channel": False, "reduce_range": True}, 1, 64)]
)
def test_scales_are_one_for_each_channel_or_one_for_the_weight(model, make_context, setting, scales, largest):
    artifact = PtqDynamic(**setting).apply(model, "int8d", make_context()).artifacts[-1]
    constants = {entry.name: numpy_helper.to_array(entry) for entry in onnx.load(artifact.path).graph.initializer}
    assert constants["head.weight_scale"].size == scales
    assert np.abs(constants["head.weight_quantized"].astype(int)).max() == largest


def test_the_metadata_of_the_float_file_reaches_the_file(model, make_context):
    path = PtqDynamic().apply(model, "int8d", make_context()).artifacts[-1].path
    stored = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert stored["class_names"] == '["a", "b", "c"]'


def test_a_model_without_linear_layers_is_refused_in_words_and_leaves_nothing(make_context, tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()).eval()
    with pytest.raises(CvtrainError, match=r"no linear layer.*\n.*ptq_static"):
        PtqDynamic().apply(net, "int8d", make_context())
    assert list(tmp_path.iterdir()) == []


def test_quantizing_says_nothing(model, make_context, capfd):
    PtqDynamic().apply(model, "int8d", make_context())
    assert capfd.readouterr() == ("", "")
