import copy
import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cvtrain.compression import PruneUnstructured
from cvtrain.errors import ConfigError, CvtrainError


def weights_of(model):
    return [m.weight.detach() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def zero_share(weights):
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_global_pruning_zeroes_the_asked_share_of_all_weights_together(model, make_context, sparsity):
    result = PruneUnstructured(sparsity=sparsity, finetune_epochs=0).apply(model, "pruned", make_context())
    weights = weights_of(result.model)
    assert zero_share(weights) == pytest.approx(sparsity, abs=1e-3)
    assert f"{100 * sparsity:.1f} % of the weights are zero; same size and speed" in result.artifacts[-1].note
    assert max(zero_share([w]) for w in weights) - min(zero_share([w]) for w in weights) > 0.02


def test_layerwise_pruning_zeroes_the_same_share_of_every_layer(model, make_context):
    step = PruneUnstructured(sparsity=0.25, global_pruning=False, finetune_epochs=0)
    for weight in weights_of(step.apply(model, "pruned", make_context()).model):
        assert zero_share([weight]) == pytest.approx(0.25, abs=1 / weight.numel())


def test_l1_zeroes_the_smallest_magnitudes_and_leaves_the_rest_as_they_were(model, make_context):
    before = torch.cat([w.flatten() for w in weights_of(model)])
    result = PruneUnstructured(sparsity=0.5, finetune_epochs=0).apply(model, "pruned", make_context())
    after = torch.cat([w.flatten() for w in weights_of(result.model)])
    gone = after == 0
    assert before[gone].abs().max() <= before[~gone].abs().min()
    assert torch.equal(after[~gone], before[~gone])


def test_random_pruning_depends_on_its_seed_and_on_no_global_generator(model, make_context):
    def zeros(seed):
        step = PruneUnstructured(importance="random", finetune_epochs=0, seed=seed)
        return torch.cat([(w == 0).flatten() for w in weights_of(step.apply(model, "pruned", make_context()).model)])

    state = torch.get_rng_state()
    first = zeros(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(zeros(1), first)
    assert not torch.equal(zeros(2), first)
    assert first.float().mean() == pytest.approx(0.5, abs=1e-3)


def test_the_zeros_hold_while_finetuning_moves_the_other_weights(model, make_context):
    context = make_context()
    frozen = PruneUnstructured(finetune_epochs=0).apply(model, "pruned", context).model
    tuned = PruneUnstructured(finetune_epochs=3).apply(model, "pruned", context).model
    for dense, trained in zip(weights_of(frozen), weights_of(tuned), strict=True):
        assert (trained[dense == 0] == 0).all()
        assert not torch.equal(trained[dense != 0], dense[dense != 0])


@pytest.mark.parametrize(("epochs", "calls"), [(0, []), (4, [(4, 0.3, None)])])
def test_finetuning_gets_the_configured_epochs_and_is_skipped_at_zero(model, make_context, epochs, calls):
    seen = []
    context = make_context(finetune=lambda _, *given: seen.append(given))
    PruneUnstructured(finetune_epochs=epochs, finetune_lr=0.3).apply(model, "pruned", context)
    assert seen == calls


def test_the_masked_model_can_be_copied_as_an_ema_does(model, make_context):
    copies = []
    PruneUnstructured().apply(model, "pruned", make_context(finetune=lambda m, *_: copies.append(copy.deepcopy(m))))
    assert len(copies) == 1


def test_the_callers_model_is_left_alone(model, make_context):
    before = copy.deepcopy(model.state_dict())
    PruneUnstructured().apply(model, "pruned", make_context())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_the_result_has_plain_weights_and_its_file_holds_them(model, make_context, tmp_path):
    result = PruneUnstructured().apply(model, "pruned", make_context())
    assert list(result.model.state_dict()) == list(model.state_dict())
    assert not result.model.training
    assert result.artifacts[-1].path == tmp_path / "pruned.safetensors"
    stored = load_file(result.artifacts[-1].path)
    assert all(torch.equal(stored[key], value) for key, value in result.model.state_dict().items())
    assert (result.artifacts[-1].name, result.artifacts[-1].runtime) == ("pruned", "torch")
    assert result.artifacts[-1].params == sum(p.numel() for p in model.parameters())


def test_attention_models_can_be_pruned_and_finetuned_for_several_steps(make_context):
    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 4, stride=4)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, images):
            tokens = self.stem(images).flatten(2).transpose(1, 2)
            return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    vit = Attentive().eval()
    result = PruneUnstructured(finetune_epochs=3).apply(vit, "pruned", make_context(example=torch.randn(1, 3, 8, 8)))
    assert zero_share([result.model.stem.weight, result.model.head.weight]) == pytest.approx(0.5, abs=1e-3)
    assert (result.model.attention.out_proj.weight != 0).all()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"sparsity": 1.0}, ["sparsity=1.0", "below 1"]),
        ({"sparsity": 0.0}, ["sparsity=0.0", "above 0"]),
        ({"sparsity": float("nan")}, ["sparsity=nan"]),
        ({"importance": "l2"}, ["importance=l2", "l1", "random"]),
        ({"finetune_epochs": -1}, ["finetune_epochs=-1", "0 or more"]),
        ({"finetune_lr": -0.1}, ["finetune_lr=-0.1", "above 0"]),
        ({"iterative_steps": [0.3, 0.1, 0.5]}, ["iterative_steps=[0.3, 0.1, 0.5]", "rise"]),
        ({"iterative_steps": [0.1, 0.7]}, ["ends at 0.7, not at sparsity=0.5", "sparsity=0.7"]),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_key_value_and_range(setting, words):
    with pytest.raises(ConfigError) as caught:
        PruneUnstructured(**setting)
    assert all(word in str(caught.value) for word in ["compression.prune_unstructured", *words])


def test_a_model_without_anything_to_prune_is_refused(make_context):
    with pytest.raises(CvtrainError, match="no convolution or linear layer"):
        PruneUnstructured().apply(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)), "pruned", make_context())


def test_both_importances_are_reachable_for_both_scopes(model, make_context):
    for importance, scope in itertools.product(["l1", "random"], [True, False]):
        step = PruneUnstructured(0.5, importance=importance, global_pruning=scope, finetune_epochs=1)
        assert zero_share(weights_of(step.apply(model, "pruned", make_context()).model)) == pytest.approx(0.5, abs=0.01)


def test_stages_zero_more_each_time_and_keep_the_zeros_of_the_ones_before(model, make_context, tmp_path):
    tuned, train = [], make_context().finetune

    def finetune(network, epochs, lr, teacher):
        train(network, epochs, lr, teacher)
        tuned.append((epochs, teacher))

    for importance, scope in itertools.product(["l1", "random"], [True, False]):
        step = PruneUnstructured(0.5, [0.1, 0.3, 0.5], importance, scope, finetune_epochs=2)
        result = step.apply(model, "pruned", make_context(finetune=finetune, evaluate=lambda network: 0.9))
        assert [artifact.name for artifact in result.artifacts] == ["pruned10", "pruned30", "pruned"]
        stages = [load_file(artifact.path) for artifact in result.artifacts]
        for name in ("features.0.weight", "features.3.weight", "head.weight"):
            zeros = [stage[name] == 0 for stage in stages]
            assert not (zeros[0] & ~zeros[1]).any()
            assert not (zeros[1] & ~zeros[2]).any()
        shares = [zero_share([stage[name] for name in stage if stage[name].dim() > 1]) for stage in stages]
        assert shares == pytest.approx([0.1, 0.3, 0.5], abs=0.01)
        assert [point.amount for point in result.tradeoff] == pytest.approx([0.0, 0.1, 0.3, 0.5], abs=0.01)
        assert len({point.macs for point in result.tradeoff}) == 1
    assert tuned == [(2, None)] * 12


def test_the_curve_counts_the_weights_that_are_not_zero(model, make_context):
    step = PruneUnstructured(0.5, [0.25, 0.5], finetune_epochs=0)
    before, _, after = step.apply(model, "pruned", make_context()).tradeoff
    weights = sum(w.numel() for w in weights_of(model))
    assert before.params == sum(p.numel() for p in model.parameters())
    assert before.params - after.params == pytest.approx(0.5 * weights, abs=1)
    assert (before.artifact, after.artifact) == ("", "pruned")


def test_each_layers_zeros_are_counted(model, make_context):
    result = PruneUnstructured(0.5, finetune_epochs=0).apply(model, "pruned", make_context())
    assert [row["layer"] for row in result.layers] == ["features.0", "features.3", "head"]
    assert result.layers[1]["shape"] == "16x8x3x3"
    for row, weight in zip(result.layers, weights_of(result.model), strict=True):
        assert (row["weights"], row["zeros"]) == (weight.numel(), int((weight == 0).sum()))
        assert row["sparsity"] == row["zeros"] / row["weights"]
    assert not result.smaller
    assert not result.tradeoff
    assert not result.artifacts[0].exact
