"""Label smoothing, dropout, and stochastic depth by itself; test_every_network.py has it on whole networks."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torchvision import models

from cvtrain.errors import ConfigError
from cvtrain.model import LeNet5, SimpleCNN
from cvtrain.regularizer import Dropout, LabelSmoothing, Regularizer, StochasticDepth, drop_rates

OPTIONS = sorted((Path(__file__).resolve().parents[2] / "configs" / "regularizer").glob("*.yaml"))


pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert [path.stem for path in OPTIONS] == ["dropout", "label_smoothing", "none", "stochastic_depth"]
    nodes = {path.stem: OmegaConf.load(path) for path in OPTIONS}
    assert nodes.pop("none") == {}
    assert vars(instantiate(nodes["dropout"])) == vars(Dropout())
    assert vars(instantiate(nodes["label_smoothing"])) == vars(LabelSmoothing())
    assert vars(instantiate(nodes["stochastic_depth"])) == vars(StochasticDepth())


def elements(model, images):
    """What reaches the last linear layer."""
    seen = []
    handle = [m for m in model.modules() if isinstance(m, nn.Linear)][-1].register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0])
    )
    model(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("drop_prob", [0.1, 0.5])
def test_dropout_before_the_last_layer_drops_at_the_rate_and_keeps_the_mean(drop_prob):
    torch.manual_seed(0)
    model = SimpleCNN(10, 1, 8)
    names = list(model.state_dict())
    plain = elements(model.eval(), torch.rand(256, 1, 8, 8))
    Dropout(drop_prob).attach(model)
    assert list(model.state_dict()) == names
    torch.manual_seed(0)
    model = SimpleCNN(10, 1, 8)
    images = torch.rand(256, 1, 8, 8)
    Dropout(drop_prob).attach(model)
    assert torch.equal(elements(model.eval(), images), plain)
    batch_norm = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model.train()
    for module in batch_norm:
        module.eval()
    dropped = elements(model, images)
    kept = dropped != 0
    assert torch.allclose(dropped[kept], plain[kept] / (1 - drop_prob), rtol=1e-4)
    count = int((plain != 0).sum())
    share = 1 - int(kept.sum()) / count
    assert abs(share - drop_prob) < 4 * math.sqrt(drop_prob * (1 - drop_prob) / count)


def test_dropout_sets_the_networks_own_layers_and_then_hooks_nothing():
    model = models.alexnet(weights=None, num_classes=2)
    Dropout(0.3).attach(model)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.3, 0.3]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_dropout_finds_the_last_layer_that_runs_not_the_last_that_is_written_down():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(4, 2), nn.Conv2d(1, 4, 3)

        def forward(self, images):
            return self.head(self.body(images).mean((2, 3)))

    model = Backwards()
    Dropout(0.5).attach(model)
    assert model.head._forward_pre_hooks
    assert not model.body._forward_pre_hooks


def test_dropout_is_logged_with_the_place(caplog):
    caplog.set_level("INFO", logger="cvtrain")
    Dropout(0.3).attach(SimpleCNN(10, 1, 8))
    Dropout(0.4).attach(models.alexnet(weights=None, num_classes=2))
    assert "dropout: 0.3 before head, the last layer" in caplog.text
    assert "dropout: 0.4 in the network's 2 dropout layers" in caplog.text


def test_dropout_refuses_a_network_without_layers_with_the_fix():
    with pytest.raises(ConfigError, match=r"(?s)regularizer=dropout does not fit .*leave dropout out"):
        Dropout().attach(nn.Sequential(nn.Flatten()))


def test_the_rates_of_all_branches_can_be_listed():
    model = Residual(4)
    assert drop_rates(model) == {}
    StochasticDepth(0.6).attach(model)
    assert drop_rates(model) == pytest.approx({f"branches.{i}": 0.15 * (i + 1) for i in range(4)})


def test_the_rates_are_logged_with_short_names(caplog):
    caplog.set_level("INFO", logger="cvtrain")
    StochasticDepth(0.4).attach(models.resnet18(weights=None, num_classes=2), (3, 32, 32))
    assert "8 branches, drop rate: layer1.0 0.050, layer1.1 0.100, layer2.0 0.150, " in caplog.text
    assert "layer4.1 0.400" in caplog.text
    StochasticDepth(0.5).attach(Residual(1), (1, 4, 4))
    assert "1 branch, drop rate: 0 0.500" in caplog.text


def test_branches_of_a_frozen_stage_rest_and_a_copy_has_a_mode_of_its_own():
    torch.manual_seed(0)
    model = models.resnet18(weights=None, num_classes=2)
    StochasticDepth(0.5).attach(model, (3, 32, 32))
    copied, images = copy.deepcopy(model), torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        for each in (model, copied):
            plain = each.eval()(images)
            each.layer4.train()
            for module in each.layer4.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.0
            assert not torch.allclose(each(images), plain)
            each.layer4.eval()
            assert torch.equal(each(images), plain)
        model.layer4.train()
        assert torch.equal(copied(images), plain)
