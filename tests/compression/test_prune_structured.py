import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from cvtrain.compression import PruneStructured, PruneUnstructured
from cvtrain.compression.budget import ratio_within, relative_latency
from cvtrain.compression.channels import channel_groups
from cvtrain.compression.importance import channel_scores
from cvtrain.core.channel_plan import apply_plan, plan_of
from cvtrain.core.complexity import count_macs, count_params
from cvtrain.core.weights import load_into, read, save_weights
from cvtrain.errors import ConfigError
from cvtrain.model import SimpleCNN, torchvision_model

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLE = torch.zeros(1, 1, 8, 8)


def make():
    torch.manual_seed(0)
    return SimpleCNN(3, 1, 8, (32, 64, 64)).eval()


@pytest.fixture
def context(make_context):
    return make_context(example=EXAMPLE)


def widths(model):
    return [len(module.weight) for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def prune(context, model=None, **settings):
    return PruneStructured(**{"finetune_epochs": 0, "round_to": 8, **settings}).apply(
        model or make(), "pruned", context
    )


def test_uniform_pruning_takes_the_same_share_of_every_layer_but_the_classifier(context):
    assert widths(prune(context, pruning_ratio=0.5).model) == [16, 32, 32, 3]
    assert widths(prune(context, pruning_ratio=0.3).model) == [24, 48, 48, 3]  # 22.4 and 44.8, to multiples of 8


def test_what_is_left_is_a_multiple_of_round_to_and_no_less(context):
    assert widths(prune(context, pruning_ratio=0.95).model) == [8, 8, 8, 3]
    assert widths(prune(context, pruning_ratio=0.95, round_to=1).model) == [2, 3, 3, 3]
    assert widths(prune(context, pruning_ratio=0.5, round_to=64).model) == [32, 64, 64, 3]


def test_the_least_important_channels_go_and_the_others_keep_their_weights(context):
    model = make()
    conv, norm = model.features[0], model.features[1]
    with torch.no_grad():
        conv.weight[1::2] *= 0.01
        norm.weight[1::2] = 0.01
        model.features[3].weight[:, 1::2] *= 0.01
    pruned = prune(context, model, pruning_ratio=0.5).model
    assert torch.equal(pruned.features[0].weight, conv.weight[::2])
    assert torch.equal(pruned.features[1].weight, norm.weight[::2])


@pytest.mark.parametrize(("target", "count"), [("target_macs", count_macs), ("target_params", count_params)])
@pytest.mark.parametrize("scope", [True, False])
def test_a_budget_is_met_and_not_undercut_by_much(context, target, count, scope):
    arguments = (EXAMPLE,) if count is count_macs else ()
    result = prune(context, **{target: 0.4}, global_pruning=scope, round_to=2)
    share = count(result.model, *arguments) / count(make(), *arguments)
    assert 0.36 < share <= 0.4


def test_without_a_target_45_percent_of_the_arithmetic_stay(context):
    result = prune(context, round_to=1)
    assert 0.42 < count_macs(result.model, EXAMPLE) / count_macs(make(), EXAMPLE) <= 0.45


def test_global_pruning_ranks_the_channels_of_all_layers_together(context):
    model = make()
    with torch.no_grad():  # all channels of the first layer alike, half of each other layer's nearly nothing
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.fill_(1.0)
        for position in (1, 2):
            convolution = [m for m in model.modules() if isinstance(m, nn.Conv2d)][position]
            convolution.weight[:32] = 1e-3
    counts = widths(prune(context, model, pruning_ratio=0.4, global_pruning=True).model)
    assert counts == [32, 32, 32, 3]


def test_a_budget_that_no_network_of_such_layers_meets_is_refused_before_training(context):
    step = PruneStructured(target_macs=0.001, round_to=8)
    for refuse in (lambda: step.check(make(), EXAMPLE), lambda: step.apply(make(), "pruned", context)):
        with pytest.raises(ConfigError, match=r"target_macs=0\.001 cannot be reached: 0\.0\d+ are left") as caught:
            refuse()
        assert "round_to=8" in str(caught.value)


def test_so_small_a_share_that_rounding_takes_nothing_is_refused_before_training(context):
    with pytest.raises(ConfigError, match="Lower round_to"):
        PruneStructured(iterative_steps=[0.01, 0.5], round_to=8).check(make(), context.example)
    PruneStructured(pruning_ratio=0.5, round_to=8).check(make(), context.example)


def test_the_dry_run_changes_nothing_and_passes_what_fits():
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    PruneStructured(target_macs=0.5).check(model, EXAMPLE)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_dry_run_refuses_scales_of_batch_norm_where_there_is_none():
    plain = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 3))
    with pytest.raises(ConfigError, match="bn_scale: Sequential has no batch norm; use importance=magnitude"):
        PruneStructured(importance="bn_scale").check(plain, EXAMPLE)


def test_scales_of_batch_norm_rank_channels_by_their_magnitude():
    model = make()
    groups = channel_groups(model, EXAMPLE)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.linspace(-1, 2, module.num_features)
    for group, score in zip(groups, channel_scores(model, groups, "bn_scale", 0), strict=True):
        expected = torch.linspace(-1, 2, group.channels).abs()
        torch.testing.assert_close(score, expected / expected.mean())


def test_taylor_scores_are_the_squared_products_of_weights_and_gradients_of_a_group():
    model = make()
    groups = channel_groups(model, EXAMPLE)
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    scores = {g.layer: s for g, s in zip(groups, channel_scores(model, groups, "taylor", 0), strict=True)}
    first, norm, second = (
        model.features[0],
        model.features[1],
        [m for m in model.modules() if isinstance(m, nn.Conv2d)][1],
    )
    products = [(m.weight * m.weight.grad).square() for m in (first, norm, second)]
    expected = products[0].sum((1, 2, 3)) + products[1] + products[2].sum((0, 2, 3))
    torch.testing.assert_close(scores["features.0"], (expected / expected.mean()).detach())


def test_taylor_asks_for_gradients_of_frozen_weights_too_and_leaves_none_behind(context):
    model = make()
    model.features[0].requires_grad_(False)
    result = prune(context, model, pruning_ratio=0.5, importance="taylor")
    assert widths(result.model) == [16, 32, 32, 3]
    assert all(parameter.grad is None for net in (model, result.model) for parameter in net.parameters())
    assert not result.model.features[0].weight.requires_grad
    assert result.model.head.weight.requires_grad


def test_random_pruning_depends_on_its_seed_and_on_no_global_generator(context):
    def kept(seed):
        return prune(context, pruning_ratio=0.5, importance="random", seed=seed).model.features[0].weight

    first = kept(1)
    state = torch.get_rng_state()
    assert torch.equal(kept(1), first)
    assert not torch.equal(kept(2), first)
    make()  # what building the network leaves of the global generator
    assert torch.equal(torch.get_rng_state(), state)


def test_the_result_says_what_is_left_and_the_given_model_is_untouched(context):
    model = make()
    before = copy.deepcopy(model.state_dict())
    result = prune(context, model, pruning_ratio=0.5)
    (artifact,) = result.artifacts
    assert (artifact.name, artifact.runtime, artifact.exact, artifact.path.name) == (
        "pruned",
        "torch",
        False,
        "pruned.safetensors",
    )
    assert (artifact.params, artifact.macs) == (count_params(result.model), count_macs(result.model, EXAMPLE))
    share = 100 * artifact.macs / count_macs(model, EXAMPLE)
    assert f"{share:.1f} % of the MACs" in artifact.note
    assert result.smaller
    assert not result.tradeoff
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert result.layers[0] == {
        "layer": "features.0", "kind": "Conv2d", "channels": 32, "channels_left": 16, "params": 288, "params_left": 144,
    }  # fmt: skip
    assert result.layers[-1]["channels_left"] == 3


@pytest.mark.parametrize("distill", [True, False])
def test_the_pruned_network_is_finetuned_with_the_model_before_as_its_teacher_if_asked(context, distill):
    seen, model = [], make()
    context = dataclasses.replace(context, finetune=lambda *given: seen.append(given))
    result = prune(context, model, finetune_epochs=3, finetune_lr=0.3, distill=distill)
    ((tuned, epochs, lr, teacher),) = seen
    assert tuned is result.model
    assert (epochs, lr) == (3, 0.3)
    assert teacher is (model if distill else None)


def test_stages_prune_further_each_time_and_give_a_file_and_a_point_each(context, tmp_path):
    tuned, model = [], make()
    context = dataclasses.replace(
        context,
        evaluate=lambda network: count_params(network) / count_params(model),
        finetune=lambda network, epochs, lr, _: tuned.append((widths(network)[0], epochs)),
    )
    result = prune(context, model, iterative_steps=[0.25, 0.5, 0.75], finetune_epochs=2)
    assert [artifact.name for artifact in result.artifacts] == ["pruned25", "pruned50", "pruned"]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        *("pruned.safetensors", "pruned25.safetensors", "pruned50.safetensors"),
    ]
    assert tuned == [(24, 2), (16, 2), (8, 2)]
    assert [point.amount for point in result.tradeoff] == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert [point.artifact for point in result.tradeoff] == ["", "pruned25", "pruned50", "pruned"]
    assert [point.accuracy for point in result.tradeoff] == [p.params / count_params(model) for p in result.tradeoff]
    assert result.tradeoff[0].macs == count_macs(model, EXAMPLE)
    assert [point.macs for point in result.tradeoff[1:]] == [artifact.macs for artifact in result.artifacts]
    assert widths(result.model) == [8, 16, 16, 3]


def test_global_stages_count_from_the_dense_network(context):
    result = prune(context, iterative_steps=[0.3, 0.6], global_pruning=True, round_to=1)
    assert sum(widths(result.model)[:3]) == pytest.approx(0.4 * 160, abs=1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pruning_ratio": 0.5, "target_macs": 0.5}, "pruning_ratio and target_macs each say how much"),
        ({"target_params": 0.5, "iterative_steps": [0.1, 0.2]}, "target_params and iterative_steps each say"),
        ({"pruning_ratio": 0.0}, r"pruning_ratio=0\.0: must be a share above 0 and below 1"),
        ({"target_latency": 1.0}, r"target_latency=1\.0: must be"),
        ({"iterative_steps": [0.3, 0.2]}, "must be shares that rise"),
        ({"iterative_steps": []}, "must be shares that rise"),
        ({"iterative_steps": [0.5, 1.0]}, "each above 0 and below 1"),
        ({"importance": "l1"}, "importance=l1: .*magnitude, bn_scale, taylor, random"),
        ({"round_to": 0}, "round_to=0: must be 1 or more"),
        ({"finetune_epochs": -1}, "finetune_epochs=-1: must be 0 or more"),
        ({"finetune_lr": 0.0}, "finetune_lr=0.0: must be above 0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(settings, words):
    with pytest.raises(ConfigError, match=r"(?s)compression\.prune_structured.*" + words):
        PruneStructured(**settings)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ConfigError, match=r"pip install 'cvtrain\[pruning\]'"):
        PruneStructured().check(make(), EXAMPLE)


def test_a_budget_is_sought_by_halving():
    asked = []

    def cost(ratio):
        asked.append(ratio)
        return (1 - ratio) ** 2

    assert ratio_within(cost, 0.25) == pytest.approx(0.5, abs=1 / 256)
    assert cost(ratio_within(cost, 0.3)) <= 0.3
    assert len(asked) < 30
    assert ratio_within(lambda _: 0.2, 0.3) == 0.0
    assert ratio_within(lambda _: 0.4, 0.3) is None


def test_a_network_of_a_tenth_of_the_arithmetic_is_measured_as_the_faster_one():
    narrow, wide = (nn.Conv2d(16, width, 3).eval() for width in (8, 128))
    images = torch.randn(1, 16, 64, 64)
    assert relative_latency(narrow, wide, images) < 0.6
    assert 0.4 < relative_latency(wide, copy.deepcopy(wide), images) < 2.5


@pytest.mark.slow
def test_a_budget_of_time_is_met(make_context):
    torch.manual_seed(0)
    model = SimpleCNN(3, 3, 64, (64, 128, 128)).eval()
    context = make_context(example=torch.zeros(1, 3, 64, 64))
    pruned = prune(context, model, target_latency=0.5).model
    assert relative_latency(pruned, model, context.example) < 0.7
    assert count_macs(pruned, context.example) > 0.02 * count_macs(model, context.example)


def keeping_plan(context, dense):
    def save(model, path, given):
        plan = plan_of(dense, model)
        save_weights(model, path, {**given, "channel_plan": json.dumps(plan)})

    return dataclasses.replace(context, save_weights=save)


def test_the_file_is_rebuilt_from_the_dense_network_and_its_plan_to_the_bit(context):
    model = make()
    context = keeping_plan(context, model)
    pruned = prune(context, model, pruning_ratio=0.5).model
    masked = PruneUnstructured(0.5, finetune_epochs=0).apply(pruned, "pruned+pruned", context)
    images = torch.randn(2, 1, 8, 8)
    for network, path in ((pruned, context.folder / "pruned.safetensors"), (masked.model, masked.artifacts[-1].path)):
        rebuilt = SimpleCNN(3, 1, 8, (32, 64, 64)).eval()
        apply_plan(rebuilt, json.loads(read(path)[1]["channel_plan"]))
        load_into(rebuilt, path)
        assert torch.equal(rebuilt(images), network(images))


RELOAD = """
import sys, torch
from pathlib import Path
from cvtrain.command.deployed import load_file
torch.set_num_threads(1)
model = load_file(Path(sys.argv[1]), torch.device("cpu"), [], channels_last=False).model
images = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(7))
with torch.no_grad():
    print(model(images).numpy().tobytes().hex())
"""


@pytest.mark.slow
def test_a_fresh_process_gives_equal_logits_to_the_bit(make_context):
    torch.manual_seed(0)
    node = {"_target_": "cvtrain.model.torchvision_model", "name": "resnet18", "small_stem": "auto"}
    model = torchvision_model(3, 3, 32, "resnet18").eval()
    preprocess = {"img_size": 32, "resize": 32, "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    told = {"model": json.dumps(node), "class_names": '["a","b","c"]', "preprocess": json.dumps(preprocess)}
    context = make_context(example=torch.zeros(1, 3, 32, 32))

    def save(network, path, given):
        save_weights(network, path, {**told, **given, "channel_plan": json.dumps(plan_of(model, network))})

    pruned = prune(dataclasses.replace(context, save_weights=save), model, target_macs=0.45).model
    command = [sys.executable, "-c", RELOAD, str(context.folder / "pruned.safetensors")]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    images = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert pruned(images).numpy().tobytes().hex() == told
