"""Strategies in runs built from configs: what is composed, printed, refused and warned of."""

import copy
import io
import logging

import pytest
import torch
from rich.console import Console

from cvtrain.build import Builder
from cvtrain.command.learning_rate import measure
from cvtrain.command.processes import refuse_more_than_batch_norm
from cvtrain.command.train import build_run
from cvtrain.compose import Composer
from cvtrain.core.stages import Stage
from cvtrain.engine.batch_norm import remeasure
from cvtrain.engine.loop import fit
from cvtrain.engine.signals import StopRequest
from cvtrain.errors import ConfigError
from cvtrain.finetune import Full, Progressive
from cvtrain.report.console import stages_table

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = (
    *("threads=1", "workers=0", "device=cpu", "logger=none", "compression=none", "export=none", "data.limit=300"),
    *("model.widths=[4,6,8]", "limit_train_batches=2", "limit_eval_batches=1", "batch_size=16"),
)


def composed(*overrides):
    return Composer("train", None).check([*QUICK, *overrides], [])[1]


def built(folder, *overrides):
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    builder = Builder(composed(*overrides), [])
    return build_run(builder, builder.data()[0], torch.device("cpu"), folder, StopRequest())


@pytest.mark.parametrize(
    ("override", "factor"),
    [
        ("layer_decay=0.5", lambda behind: 0.5**behind),
        ("finetune.lr_scale={head:10}", lambda behind: 1 if behind else 10),
    ],
)
def test_layer_decay_and_lr_scale_reach_the_optimizer(tmp_path, override, factor):
    run = built(tmp_path, override, "scheduler=constant", "optimizer.lr=0.02", "epochs=1")
    fit(run)
    rates = {name: g["lr"] for g in run.optimizer.param_groups for name in g["param_names"]}
    assert len(run.finetune.stages) >= 3
    for behind, stage in enumerate(reversed(run.finetune.stages)):
        assert [rates[name] for name in stage.parameters] == pytest.approx(
            [0.02 * factor(behind)] * len(stage.parameters)
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layer_decay=0.5", "finetune.lr_scale={head:10}"], "layer_decay=0.5 and finetune.lr_scale both set"),
        (["finetune=progressive", "resizing=progressive"], "both divide the run into learning-rate cycles"),
        (["layer_decay=1.5"], "layer_decay=1.5 is not allowed"),
        (["finetune.lr_scale={head:0}"], "finetune.lr_scale.head=0 is not allowed; expected a number above 0"),
        (["finetune.lr_scale=3"], "finetune.lr_scale=3 is not allowed"),
        (
            ["finetune=progressive", "scheduler=cosine", "scheduler.warmup_epochs=3"],
            "leaves nothing of finetune.phases.head.epochs=3",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_told_before_anything_is_loaded(overrides, message):
    with pytest.raises(ConfigError) as refused:
        composed(*overrides)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["finetune=feature_extraction", "layer_decay=0.5"], "layer_decay=0.5 does nothing with finetune"),
        (["finetune=progressive", "epochs=6"], "the phases take 3 + 3 + the rest epochs, the run has 6"),
        (["finetune.lr_scale={stage7:2}"], "stage7"),
        (
            ["finetune=partial", "stages=[[features],[head]]"],
            "finetune=partial needs a model of 3 stages or more, this one has 2 (stem, head)",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_told_before_the_first_epoch(tmp_path, overrides, message):
    with pytest.raises(ConfigError) as refused:
        built(tmp_path, *overrides)
    assert message in str(refused.value)


def test_freezing_weights_that_nobody_trained_is_warned_of_and_full_training_is_not(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "cvtrain"):
        built(tmp_path / "full", "epochs=1")
        assert "frozen" not in caplog.text
        built(tmp_path / "frozen", "finetune=feature_extraction", "epochs=1")
    assert "what is frozen (stem, stage1, stage2) has weights that nobody has trained; set pretrained=" in caplog.text


def test_a_network_that_cannot_be_followed_trains_in_full_and_refuses_layer_rates(tmp_path, monkeypatch):
    def refuse(*_):
        raise ConfigError("SimpleCNN cannot be followed")

    monkeypatch.setattr("cvtrain.build.find_stages", refuse)
    run = built(tmp_path / "a", "epochs=1")
    fit(run)
    assert run.finetune.stages == ()
    with pytest.raises(ConfigError, match="cannot be followed"):
        built(tmp_path / "b", "layer_decay=0.5")


def test_the_phases_have_their_own_cycles_and_the_drawn_curve_is_the_heads(tmp_path):
    phases = ("finetune.phases.head.epochs=1", "finetune.phases.late.epochs=1", "epochs=4")
    run = built(tmp_path, "finetune=progressive", "scheduler=cosine", *phases)
    drawn = [run.schedule.lr(*run.clock(step)) for step in range(8)]
    half = [(1 + torch.cos(torch.tensor(torch.pi * k)).item()) / 2 for k in (0, 0.5, 0, 0.5, 0, 0.25, 0.5, 0.75)]
    assert drawn == pytest.approx([r * h for r, h in zip([1e-3] * 2 + [1e-4] * 2 + [5e-4] * 4, half, strict=True)])
    fit(run)
    assert [row["lr"] for row in run.state.history] == pytest.approx([drawn[i] for i in (1, 3, 5, 7)])


def test_the_learning_rate_finder_leaves_frozen_stages_alone(tmp_path):
    run = built(tmp_path, "finetune=feature_extraction", "epochs=1")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    measure(run, 5)
    changed = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(run.finetune.stages[-1].parameters)


def shown(*args):
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(stages_table(*args))
    return [" ".join(line.replace("│", " ").split()) for line in console.file.getvalue().splitlines()]


def test_the_table_says_what_trains_when_and_at_which_rate():
    stages = [
        Stage("stem", ("a",), ("a.w",)),
        Stage("stage1", ("b", "c", "d", "e"), ("b.w",)),
        Stage("head", ("f",), ("f.w",)),
    ]
    phases = {
        "head": {"epochs": 2, "head_lr": 1e-3, "late_lr": None, "early_lr": None},
        "all": {"epochs": None, "head_lr": 5e-4, "late_lr": 1e-4, "early_lr": 1e-5},
    }
    sizes = {"a.w": 1000, "b.w": 20, "f.w": 3}
    lines = shown(stages, Progressive(phases, None, stages, 9).phases, sizes, 0.1, 9)
    assert any("lr, epochs 1–2" in line and "lr, epochs 3–9" in line for line in lines)
    assert "stem a 1,000 frozen 1e-05" in lines
    assert "stage1 b, …, e 20 frozen 0.0001" in lines
    assert "head f 3 0.001 0.0005" in lines
    assert "total 1,023 3 train 1,023 train" in lines
    assert "head f 3 0.1" in shown(stages, Full(stages).phases, sizes, 0.1, 9)


def test_statistics_are_measured_anew_as_torch_does_it_but_for_norms_that_stand_in_eval():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)
    )
    twin = copy.deepcopy(model)
    batches = [torch.randn(4, 1, 6, 6) for _ in range(3)]
    remeasure(model.train(), batches)
    torch.optim.swa_utils.update_bn(batches, twin)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert model[1].momentum == 0.1
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    remeasure(model, [3 * batch for batch in batches])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"3.running_mean", "3.running_var"}


def test_stages_that_are_not_there_are_refused_whatever_trains(cvtrain):
    answer = cvtrain("stages=[[nonsense],[head]]", "epochs=1")
    assert answer.code == 2
    assert "nonsense is no module of this network" in answer.err


def test_too_few_epochs_for_the_phases_are_told_as_that(cvtrain):
    answer = cvtrain("finetune=progressive", "epochs=5", "scheduler=cosine", "scheduler.warmup_epochs=1")
    assert answer.code == 2
    assert "the phases take 3 + 3 + the rest epochs, the run has 5" in answer.err


def test_a_batch_norm_with_more_inside_is_not_shared_among_processes():
    timm = pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=r"bn1 is a BatchNormAct2d"):
        refuse_more_than_batch_norm(timm.create_model("efficientnet_b0"))
    refuse_more_than_batch_norm(timm.create_model("resnet18"))
