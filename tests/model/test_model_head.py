"""The MLP head, on networks whose classifier is of every kind."""

import pytest
import torch
from torch import nn
from zoo import build, quick_and_slow

from cvtrain.core.weights import read
from cvtrain.model.head import MLPHead

pytestmark = pytest.mark.usefixtures("one_thread")

PLACES = {
    "resnet18": ("resnet18", "fc", 512),
    "simple_cnn": (None, "head", 1024),
    "lenet5": (None, "head.5", 84),
    "vgg11": ("vgg11", "classifier.6", 4096),
    "mobilenet_v3_small": ("mobilenet_v3_small", "classifier.3", 1024),
    "googlenet": ("googlenet", "fc", 1024),
    "convnext_tiny": ("convnext_tiny", "classifier.2", 768),
    "vit_b_16": ("vit_b_16", "heads.head", 768),
}


@pytest.mark.parametrize("network", quick_and_slow(PLACES, ("resnet18", "simple_cnn", "lenet5", "vgg11")))
def test_the_head_takes_the_place_of_the_last_layer(network):
    name, place, features = PLACES[network]
    with torch.device("meta"):
        changes = {} if name is None else {"name": name}
        model = build("torchvision" if name else network, 7, 3, 32, "mlp", **changes)
    (head,) = [m for m in model.modules() if isinstance(m, MLPHead)]
    assert model.get_submodule(place) is head
    dropout, hidden, relu, second, logits = head
    assert (dropout.p, second.p) == (0.5, 0.3)
    assert (hidden.in_features, hidden.out_features, logits.in_features, logits.out_features) == (features, 512, 512, 7)
    assert isinstance(relu, nn.ReLU)
    with torch.device("meta"):
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 7)


def test_where_the_classifier_is_a_convolution_the_head_is_one_of_convolutions():
    with torch.device("meta"):
        model = build("torchvision", 7, 3, 64, "mlp", name="squeezenet1_1")
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 7)
    (head,) = [m for m in model.modules() if isinstance(m, MLPHead)]
    assert [tuple(m.weight.shape) for m in head if isinstance(m, nn.Conv2d)] == [(512, 512, 1, 1), (7, 512, 1, 1)]
    assert model.classifier[1] is head


@pytest.mark.parametrize("name", quick_and_slow(("mobilenet_v2", "squeezenet1_1", "googlenet"), ("squeezenet1_1",)))
def test_the_pictures_pass_two_dropout_layers_and_no_third(name):
    with torch.device("meta"):
        model = build("torchvision", 7, 3, 64, "mlp", name=name)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.3]


def test_gradients_reach_the_head_and_what_is_below_it():
    torch.manual_seed(0)
    model = build("simple_cnn", 3, 1, 8, "mlp").train()
    nn.functional.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8) % 3).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.slow
def test_a_run_with_the_mlp_head_is_measured_again_from_its_file(cvtrain):
    quick = ("epochs=1", "limit_train_batches=4", "threads=1", "compression=none", "export=onnx", "json=true")
    trained = cvtrain("head=mlp", *quick)
    assert trained.code == 0, trained.err
    tensors, metadata = read(trained.folder / "weights" / "model.safetensors")
    assert metadata["head"] == "mlp"
    assert tensors["head.1.weight"].shape == (512, 1024)
    again = cvtrain("val", f"run={trained.folder}", "split=test", "json=true")
    assert again.code == 0, again.err
    assert again.json["metrics"]["test/acc"] == pytest.approx(trained.json["metrics"]["test/acc"])
