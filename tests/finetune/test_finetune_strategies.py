"""What each strategy trains, at which rates, and what it refuses."""

import copy

import pytest
import torch
from finetune_parts import (
    PHASES,
    moved,
    names_of,
    network,
    progressive,
    run_of,
    stages_of,
    state,
    with_state,
)  # fmt: skip
from torch import nn

from cvtrain.averaging import Ema, Swa
from cvtrain.core.stages import Stage
from cvtrain.engine.loop import fit
from cvtrain.errors import ConfigError
from cvtrain.finetune import Early, FeatureExtraction, Full, Partial, Progressive
from cvtrain.optimizer import param_groups
from cvtrain.scheduler import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")

CONSTANT = {
    "feature_extraction": (FeatureExtraction, lambda n: n - 1),
    "partial": (Partial, lambda n: n - 2),
    "early": (lambda stages: Early(None, stages), lambda n: n // 2),
    "full": (Full, lambda n: 0),
}
SIX = [Stage(name, (), (f"{name}.weight",)) for name in ("stem", "stage1", "stage2", "stage3", "stage4", "head")]


def check_frozen(run, stages, count, before):
    """The first `count` stages are as they were, in the model and its average; all others have trained."""
    frozen_parameters, frozen = names_of(run.model, stages[:count])
    trained_parameters, _ = names_of(run.model, stages[count:])
    for model in {run.model, run.deployed}:
        assert not moved(before, model) & frozen
    assert trained_parameters <= moved(before, run.model)
    assert with_state(run) == trained_parameters
    assert all(p.grad is None for p in run.model.parameters())
    assert {name for name, p in run.model.named_parameters() if not p.requires_grad} == frozen_parameters


@pytest.mark.parametrize(
    ("name", "option", "optimizer", "averaging"),
    [
        ("simple_cnn", "full", "sgd", Ema),
        ("resnet", "feature_extraction", "adamw", Swa),
        ("resnet", "partial", "sgd", Ema),
        ("resnet", "early", "muon", Swa),
        ("mobilenet", "early", "sgd", Ema),
        ("vit", "partial", "muon", Ema),
        pytest.param("mobilenet", "feature_extraction", "muon", Ema, marks=pytest.mark.slow),
        pytest.param("mobilenet", "partial", "adamw", Swa, marks=pytest.mark.slow),
        pytest.param("vit", "early", "adamw", Swa, marks=pytest.mark.slow),
        pytest.param("vit", "feature_extraction", "sgd", Swa, marks=pytest.mark.slow),
    ],
)
def test_frozen_stages_stay_equal_to_the_bit_and_exactly_the_others_train(tmp_path, name, option, optimizer, averaging):
    """Weights, batch norm's statistics, and both in the average, with momentum, decay, mixup and precise batch norm."""
    stages = stages_of(name)
    make, count = CONSTANT[option]
    run = run_of(tmp_path, name, make(stages), optimizer, averaging(0.5))
    before = state(run.model)
    fit(run)
    assert run.averaging.count > 0
    check_frozen(run, stages, count(len(stages)), before)


def test_the_comparison_above_notices_what_a_freezing_by_gradients_alone_would_change(tmp_path):
    class GradientsOnly(FeatureExtraction):
        def train(self, model, epoch):
            model.train()

    stages = stages_of("resnet")
    run = run_of(tmp_path, "resnet", GradientsOnly(stages))
    before = state(run.model)
    fit(run)
    with pytest.raises(AssertionError):
        check_frozen(run, stages, len(stages) - 1, before)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("simple_cnn", "sgd"),
        ("vit", "muon"),
        pytest.param("mobilenet", "adamw", marks=pytest.mark.slow),
        pytest.param("resnet", "adamw", marks=pytest.mark.slow),
    ],
)
def test_progressive_unfreezing_moves_what_each_phase_names_at_its_rates(tmp_path, name, optimizer):
    stages = stages_of(name)
    strategy = progressive(name, epochs=4)
    run = run_of(tmp_path, name, strategy, optimizer, Ema(0.5), epochs=4, schedule=Schedule(0.5))
    early, late = len(stages) // 2, len(stages) - 1
    before = state(run.model)
    firsts = [late, early, 0, 0]
    rates, seen = [], []

    def after(run):
        group = {g["param_names"][0]: g["lr"] for g in run.optimizer.param_groups}
        rates.append([group[stage] for stage in (first_of(run, i, stages) for i in (0, early, late))])

    def ended(run):
        seen.append(run.state.epoch)
        check_frozen(run, stages, firsts[run.state.epoch - 1], before)

    run.display.step, run.display.end_epoch = after, lambda run, row, best: ended(run)
    fit(run)
    assert seen == [1, 2, 3, 4]
    expected = []
    for phase, lengths in (("head", 1), ("late", 1), ("all", 2)):
        keys = [PHASES[phase][key] for key in ("early_lr", "late_lr", "head_lr")]
        # the schedule is constant behind a warm-up of half an epoch, two of three steps, in each phase
        curve = ([1 / 3, 2 / 3] + [1.0] * (3 * lengths))[: 3 * lengths]
        expected += [[share * (rate or 0.0) for rate in keys] for share in curve]
    assert [r for row in rates for r in row] == pytest.approx([r for row in expected for r in row])
    assert [row["lr"] for row in run.state.history] == pytest.approx([1e-2, 4e-3, 5e-3, 5e-3])


def first_of(run, i, stages):
    """The first name of the group that has a parameter of stage i."""
    groups = [group["param_names"] for group in run.optimizer.param_groups]
    return next(names[0] for names in groups if set(names) & set(stages[i].parameters))


def test_a_fused_optimizer_keeps_no_momentum_for_what_has_never_trained(tmp_path):
    strategy = progressive("simple_cnn")
    run = run_of(tmp_path, "simple_cnn", strategy, epochs=3, limit_train_batches=1)
    states = []
    run.display.end_epoch = lambda run, row, best: states.append(with_state(run))
    fit(run)
    stages = stages_of("simple_cnn")
    assert states == [names_of(run.model, stages[k:])[0] for k in (len(stages) - 1, len(stages) // 2, 0)]


def test_momentum_and_weight_decay_do_not_move_a_stage_that_is_frozen_after_it_has_trained(tmp_path):
    """No strategy of ours freezes again; a strategy of somebody else's may."""

    class Refreezing(Full):
        def __init__(self, stages):
            super().__init__(stages)
            from cvtrain.finetune import RatesPhase, Strategy

            ones, head = (1.0,) * len(stages), (0.0,) * (len(stages) - 1) + (1.0,)
            Strategy.__init__(
                self,
                stages,
                [
                    RatesPhase(name="all", first=0, epochs=1, factors=ones),
                    RatesPhase(name="head", first=1, epochs=1, factors=head),
                ],
            )

    stages = stages_of("simple_cnn")
    run = run_of(tmp_path, "simple_cnn", Refreezing(stages), "sgd")
    states = []
    run.display.end_epoch = lambda run, row, best: states.append(state(run.model))
    fit(run)
    names = names_of(run.model, stages[:-1])[1]
    assert all(torch.equal(states[0][name], states[1][name]) for name in names)
    assert not torch.equal(states[0]["head.weight"], states[1]["head.weight"])


def test_a_copy_with_pruned_weights_is_frozen_as_the_run_was_at_its_end():
    from torch.nn.utils import prune

    model, stages = network("simple_cnn"), stages_of("simple_cnn")
    strategy = Early(1, stages).last()
    masked = copy.deepcopy(model)
    for module in masked.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            prune.l1_unstructured(module, "weight", 0.5)
    strategy.apply(masked, 7)
    frozen = {name.removesuffix("_orig") for name, p in masked.named_parameters() if not p.requires_grad}
    assert frozen == set(stages[0].parameters)
    grouped = {name for group in param_groups(masked, 0.1, strategy.part_of) for name in group["param_names"]}
    assert grouped == {name for name, p in masked.named_parameters() if p.requires_grad}


def test_what_the_network_itself_holds_fixed_stays_so():
    model = network("simple_cnn")
    model.head.bias.requires_grad_(False)
    strategy = progressive("simple_cnn", fixed=["head.bias"])
    strategy.apply(model, 0)
    strategy.apply(model, 2)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]


def test_apply_says_whether_anything_changed_and_takes_the_gradients_of_what_it_freezes():
    model, strategy = network("simple_cnn"), progressive("simple_cnn", epochs=4)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert [strategy.apply(model, epoch) for epoch in (0, 0, 1, 2, 3, 9)] == [True, False, True, True, False, False]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["head.weight", "head.bias"]
    assert not Full(stages_of("simple_cnn")).apply(model, 0)


def test_a_frozen_stage_computes_what_it_does_in_evaluation():
    model, strategy = network("resnet"), FeatureExtraction(stages_of("resnet"))
    strategy.train(model, 0)
    modes = {path: module.training for path, module in model.named_modules()}
    assert modes[""]
    assert modes["fc"]
    assert not any(modes[path] for path in modes if "bn" in path)
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(model.forward_features(images), model.eval().forward_features(images))


@pytest.mark.parametrize(
    ("strategy", "factors"),
    [
        (Full(SIX), [1] * 6),
        (Full(SIX, layer_decay=0.5), [0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5, 1]),
        (Full(SIX, lr_scale={"head": 10, "stem": 0.1}), [0.1, 1, 1, 1, 1, 10]),
        (FeatureExtraction(SIX), [0, 0, 0, 0, 0, 1]),
        (Partial(SIX, layer_decay=0.5), [0, 0, 0, 0, 0.5, 1]),
        (Early(None, SIX), [0, 0, 0, 1, 1, 1]),
        (Early(2, SIX, lr_scale={"head": 3}), [0, 0, 1, 1, 1, 3]),
    ],
)
def test_rates_are_those_of_the_formula(strategy, factors):
    found = []
    for stage in SIX:
        part = strategy.part_of(stage.parameters[0])
        found.append(0 if part is None else strategy.factors(4)[part])
    assert found == pytest.approx(factors)


def test_one_rate_for_all_costs_no_more_optimizer_groups_than_weight_decay_needs():
    model, stages = network("resnet"), stages_of("resnet")
    assert len(param_groups(model, 0.1, Full(stages).part_of)) == 2
    assert len(param_groups(model, 0.1, Partial(stages).part_of)) == 2
    assert len(param_groups(model, 0.1, progressive("resnet").part_of)) == 6
    decayed = param_groups(model, 0.1, Full(stages, layer_decay=0.9).part_of)
    assert [group["part"] for group in decayed] == sorted(2 * list(range(len(stages))))
    assert [id(p) for group in param_groups(model, 0.1, Full(stages).part_of) for p in group["params"]] == [
        id(p) for group in param_groups(model, 0.1) for p in group["params"]
    ]


def test_dropout_between_frozen_layers_rests_and_before_the_head_it_trains():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1))
            self.first, self.between = nn.Linear(4, 4), nn.Dropout(0.5)
            self.second, self.before_head, self.head = nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)

    model = Net()
    stages = [
        Stage("stem", ("first",), ("token", "first.weight", "first.bias")),
        Stage("stage1", ("second",), ("second.weight", "second.bias")),
        Stage("head", ("head",), ("head.weight", "head.bias")),
    ]
    for strategy, resting in ((FeatureExtraction(stages), True), (Early(1, stages), False), (Full(stages), False)):
        for each in (model, copy.deepcopy(model).requires_grad_(False)):
            strategy.train(each, 0)
            assert each.between.training is not resting
            assert each.before_head.training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Partial(SIX[:2]), "finetune=partial needs a model of 3 stages or more, this one has 2"),
        (lambda: FeatureExtraction(SIX[-1:]), "needs a model of 2 stages or more, this one has 1"),
        (lambda: Early(1, SIX[-1:]), "finetune=early needs a model of 2 stages"),
        (lambda: Early(6, SIX), r"finetune.early_stages=6 is too many: .*\n.*up to 5"),
        (lambda: Full(SIX, lr_scale={"stage9": 2}), r"finetune.lr_scale=\{stage9: 2\}.*stage1"),
        (lambda: Early(2, SIX, lr_scale={"stem": 2}), "lr_scale names stem, which is frozen; .* stage2, stage3"),
        (lambda: Progressive(PHASES, None, SIX[:2], 3), "finetune=progressive needs a model of 3 stages"),
        (lambda: Progressive(PHASES, 5, SIX, 3), r"early_stages=5 is too many: .*\n.*up to 4"),
        (lambda: Progressive(PHASES, None, SIX, 2), r"1 \+ 1 \+ the rest epochs, the run has 2\n.*epochs=at least 3"),
        (lambda: Progressive({}, None, SIX, 2), "the phases take 0 epochs, the run has 2"),
        (
            lambda: Progressive({**PHASES, "all": {**PHASES["all"], "epochs": 4}}, None, SIX, 3),
            r"1 \+ 1 \+ 4 epochs, the run has 3\n.*epochs=6",
        ),
        (
            lambda: Progressive({"all": PHASES["all"], "head": PHASES["head"]}, None, SIX, 3),
            "phases.all.epochs=null: only the last phase",
        ),
        (
            lambda: Progressive({"late": PHASES["late"], "head": PHASES["head"]}, None, SIX, 2),
            "phases.head freezes stages again that late trains",
        ),
        (
            lambda: Progressive({"all": {**PHASES["all"], "head_lr": None}}, None, SIX, 3),
            "phases.all.head_lr=null: the head trains in all phases",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_stages_or_the_epochs_is_told(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_phase_that_is_null_is_left_out():
    strategy = Progressive({**PHASES, "late": None}, 2, SIX, 5)
    assert [(p.name, p.first, p.epochs, p.lr) for p in strategy.phases] == [("head", 0, 1, 1e-2), ("all", 1, 4, 5e-3)]
    assert strategy.cycle(99).name == "all"
    assert strategy.last().cycle(0) is None
    assert strategy.last().factors(0) == pytest.approx((0.02, 0.2, 1))
