"""Every option of every group is composed, built, stepped and resumed; a new one is found here without being named."""

import copy

import pytest
import torch
from real_formats import write_for
from teacher_file import write_teacher

from cvtrain import catalog
from cvtrain.build import Builder
from cvtrain.command.train import build_run
from cvtrain.compose import Composer
from cvtrain.engine.loop import fit
from cvtrain.engine.signals import StopRequest

COMPOSER = Composer("train", None)
GROUPS = catalog.groups()
OPTIONS = [(group, option) for group, options in GROUPS.items() for option in options]
QUICK = ["epochs=2", "limit_train_batches=2", "limit_eval_batches=1", "batch_size=16", "device=cpu", "workers=0"]
MULTILABEL = ["task=multilabel", "loss=bce", "data=csv", "data.label_separator=|", "img_size=32"]
PHASES = [
    *(f"resizing.phases.{name}.epochs={epochs}" for name, epochs in (("small", 1), ("full", 1))),
    *("resizing.phases.small.img_size=6", "resizing.phases.medium=null"),
]
NEEDS = {
    # What the probe finds depends on the machine's other work; only a resume takes it from the checkpoint.
    ("precision", "amp"): ["precision.probe=false"],
    ("regularizer", "stochastic_depth"): ["model=resnet18"],
    ("task", "multilabel"): MULTILABEL,
    ("loss", "bce"): MULTILABEL,
    ("loss", "focal_bce"): [MULTILABEL[0], *MULTILABEL[2:]],
    ("resizing", "progressive"): ["model=resnet18", "img_size=8", *PHASES],
    ("finetune", "progressive"): ["finetune.phases.head.epochs=1", "finetune.phases.late=null"],
}
REFUSED_ON_CPU = {("precision", "fp16"), ("export", "tensorrt")}
# Other architectures behind the class of model=resnet18, and AlexNet with its 58 million parameters: tests/model takes
# a training step with each and exports it; here each would be stepped twice and write checkpoints of up to a gigabyte.
STEPPED_ELSEWHERE = {
    ("model", name)
    for name in (
        *("alexnet", "vgg16", "googlenet", "inception_v3", "resnet34", "resnet50", "resnext50_32x4d"),
        *("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "convnext_tiny", "vit_b_16"),
        *(f"efficientnet_b{i}" for i in range(8)),
    )
}


def test_the_number_of_groups_and_options_is_known():
    assert len(GROUPS) == 18
    assert len(OPTIONS) == 121


pytestmark = pytest.mark.usefixtures("one_thread")


def built(config, folder):
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    builder = Builder(copy.deepcopy(config), [])
    sets, _ = builder.data()
    run = build_run(builder, sets, torch.device("cpu"), folder, StopRequest())
    run.tracker = builder.build("logger", folder=folder, purge_step=None)
    return run


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{group}={option}" for group, option in OPTIONS])
def test_an_option_builds_steps_and_resumes_to_the_same_weights(group, option, tmp_path):
    if (group, option) in REFUSED_ON_CPU:
        pytest.skip("needs a GPU; refused on a CPU with a message, see the front's tests")
    if (group, option) in STEPPED_ELSEWHERE:
        pytest.skip("stepped and exported in tests/model")
    overrides = [*QUICK, f"{group}={option}", *NEEDS.get((group, option), [])]
    if group == "data":
        overrides += [*write_for(option, tmp_path / "data"), "img_size=32"]
    elif "data=csv" in overrides:
        overrides += write_for("csv", tmp_path / "data")
    if (group, option) == ("distillation", "kd"):
        overrides += [f"distillation.teacher={write_teacher(tmp_path / 'teacher.safetensors')}"]
    if (group, option) == ("debug", "fdr"):
        overrides += ["epochs=2"]
    config = COMPOSER.check(overrides, [])[1]
    whole = built(config, tmp_path / "whole")
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    fit(whole)
    assert whole.state.step == 4
    assert any(not torch.equal(value, before[name]) for name, value in whole.model.state_dict().items())

    half = built(config, tmp_path / "parts")
    fit_one_epoch(half)
    rest = built(config, tmp_path / "parts")
    assert rest.checkpoints.restore(rest) == "last.safetensors"
    assert rest.state.step == 2
    fit(rest)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name
    assert rest.state.history == whole.state.history


@pytest.mark.parametrize("option", sorted(option for _, option in STEPPED_ELSEWHERE - {("model", "alexnet")}))
def test_a_network_that_is_stepped_elsewhere_differs_from_one_that_is_stepped_here_by_its_name_alone(option):
    stepped, other = (COMPOSER.check([f"model={name}"], [])[1]["model"] for name in ("resnet18", option))
    other.pop("native_size", None)
    assert other == {**stepped, "name": option}


class EnoughError(Exception):
    pass


def fit_one_epoch(run):
    save = run.checkpoints.save

    def save_and_leave(*args, **kwargs):
        save(*args, **kwargs)
        raise EnoughError

    run.checkpoints.save = save_and_leave
    with pytest.raises(EnoughError):
        fit(run)
