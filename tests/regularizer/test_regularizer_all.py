"""Label smoothing and stochastic depth."""

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torchvision import models
from torchvision.ops import StochasticDepth as TorchvisionStochasticDepth

from cvtrain.core.anatomy import residual_branches
from cvtrain.errors import ConfigError
from cvtrain.model import LeNet5, torchvision_model
from cvtrain.regularizer import LabelSmoothing, Regularizer, StochasticDepth
from cvtrain.regularizer.stochastic_depth import DropBranch

NETWORKS = ["resnet18", "mobilenet_v2", "efficientnet_b0", "convnext_tiny"]
OPTIONS = sorted((Path(__file__).resolve().parents[2] / "configs" / "regularizer").glob("*.yaml"))


pytestmark = pytest.mark.usefixtures("one_thread")


def rates(model):
    own = [m.p for m in model.modules() if isinstance(m, TorchvisionStochasticDepth)]
    if own:
        return own
    hooks = [model.get_submodule(path)._forward_hooks.values() for path in residual_branches(model)]
    return [hook.drop_prob for found in hooks for hook in found if isinstance(hook, DropBranch)]


@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("classes", [2, 10])
def test_the_target_gets_1_minus_e_plus_e_over_k_and_the_others_e_over_k(epsilon, classes):
    soft = LabelSmoothing(epsilon).soften(torch.eye(classes))
    for row in range(classes):
        for column in range(classes):
            expected = (1 - epsilon + epsilon / classes) if row == column else epsilon / classes
            assert float(soft[row, column]) == pytest.approx(expected, abs=1e-7)
    assert torch.allclose(soft.sum(1), torch.ones(classes))


def test_smoothing_and_the_loss_equal_torchs_own_label_smoothing():
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 5), torch.randint(0, 5, (8,))
    soft = LabelSmoothing(0.2).soften(nn.functional.one_hot(labels, 5).float())
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    assert torch.allclose(nn.functional.cross_entropy(logits, soft), expected, atol=1e-6)


def test_a_regularizer_by_itself_changes_nothing():
    targets, model = torch.eye(3), nn.Linear(2, 2)
    Regularizer().attach(model)
    assert Regularizer().soften(targets) is targets
    assert not model._forward_hooks


@pytest.mark.parametrize("name", NETWORKS)
def test_the_drop_rates_rise_linearly_with_depth_to_drop_prob(name):
    model = models.get_model(name, weights=None, num_classes=2)
    StochasticDepth(0.4).attach(model)
    found = rates(model)
    expected = {"resnet18": 8, "mobilenet_v2": 10, "efficientnet_b0": 16, "convnext_tiny": 18}[name]
    assert found == pytest.approx([0.4 * (i + 1) / expected for i in range(expected)])


def random_norms(model):
    """A residual network may begin with branches of zero, whose dropping nobody would see."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)


@pytest.mark.parametrize("name", NETWORKS)
def test_in_evaluation_the_output_is_the_plain_models_to_the_bit(name):
    torch.manual_seed(0)
    model = torchvision_model(3, 3, 32, name).eval()
    random_norms(model)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images)
        StochasticDepth(0.5).attach(model)
        assert torch.equal(model(images), plain)
        assert torch.equal(model.train().eval()(images), plain)


@pytest.mark.parametrize("name", NETWORKS)
def test_in_training_it_drops_and_every_parameter_may_still_learn(name):
    torch.manual_seed(0)
    model = torchvision_model(3, 3, 32, name)
    random_norms(model)
    StochasticDepth(0.5).attach(model)
    for module in model.modules():  # what is left to be random is stochastic depth
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.randn(2, 3, 32, 32)
    outputs = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        outputs.append(model.train()(images))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    outputs[0].square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


class Residual(nn.Module):
    """x + x, L times, so that the output counts the branches that were kept."""

    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(1, 1, 1, bias=False) for _ in range(branches))
        for branch in self.branches:
            nn.init.ones_(branch.weight)

    def forward(self, images):
        for branch in self.branches:
            images = images + branch(images)
        return images


@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 0.9])
def test_whole_samples_are_dropped_at_the_rate_and_the_others_scaled_to_the_same_mean(drop_prob):
    torch.manual_seed(0)
    model = Residual(1).train()
    StochasticDepth(drop_prob).attach(model)
    count = 20_000
    branch = model(torch.ones(count, 1, 2, 2)) - 1
    assert torch.equal(branch, branch[:, :, :1, :1].expand_as(branch))  # a sample as a whole
    values = branch[:, 0, 0, 0]
    kept = values > 0
    assert torch.allclose(values[kept], torch.tensor(1 / (1 - drop_prob)))
    dropped = 1 - kept.float().mean().item()
    assert abs(dropped - drop_prob) < 4 * math.sqrt(drop_prob * (1 - drop_prob) / count)


def test_each_branch_drops_at_its_own_rate_and_independently_of_the_others():
    torch.manual_seed(0)
    model = Residual(4).train()
    StochasticDepth(0.6).attach(model)
    seen = []
    for branch in model.branches:
        branch.register_forward_hook(lambda m, i, output: seen.append((output != 0).flatten().float()))
    count = 20_000
    model(torch.ones(count, 1, 1, 1))
    for i, kept in enumerate(seen):
        rate = 0.6 * (i + 1) / 4
        assert abs(1 - kept.mean().item() - rate) < 4 * math.sqrt(rate * (1 - rate) / count)
    correlations = torch.corrcoef(torch.stack(seen))[torch.triu_indices(4, 4, 1).unbind()]
    assert correlations.abs().max() < 4 / math.sqrt(count)


def test_the_draws_are_a_function_of_torchs_seed():
    model = Residual(2).train()
    StochasticDepth(0.5).attach(model)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(torch.ones(64, 1, 1, 1)))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_a_network_without_residual_branches_is_refused_with_the_fix():
    with pytest.raises(ConfigError, match=r"(?s)regularizer=stochastic_depth does not fit .*LeNet5.*model=resnet18"):
        StochasticDepth(0.1).attach(LeNet5(10, 1, 28))


def test_every_regularizer_option_builds_what_it_names():
    assert [path.stem for path in OPTIONS] == ["label_smoothing", "none", "stochastic_depth"]
    nodes = {path.stem: OmegaConf.load(path) for path in OPTIONS}
    assert nodes.pop("none") == {}
    assert vars(instantiate(nodes["label_smoothing"])) == vars(LabelSmoothing())
    assert vars(instantiate(nodes["stochastic_depth"])) == vars(StochasticDepth())
