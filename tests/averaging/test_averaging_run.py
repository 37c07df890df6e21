"""Averages in whole runs: what is evaluated, deployed, stored and resumed."""

import csv

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cvtrain.build import Builder
from cvtrain.command.train import build_run
from cvtrain.compose import Composer
from cvtrain.engine.loop import evaluate, fit
from cvtrain.engine.signals import StopRequest
from cvtrain.precision import Fp32

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("threads=1", "workers=0", "device=cpu", "logger=none", "compression=none", "export=none")
SMALL = ("data.limit=400", "limit_eval_batches=1", "model.widths=[8,8]")
KINDS = [["averaging=ema"], ["averaging=ema", "averaging.every_steps=3"], ["averaging=swa", "averaging.start=0.3"]]


def built(folder, *overrides):
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    config = Composer("train", None).check([*QUICK, *overrides], [])[1]
    builder = Builder(config, [])
    return build_run(builder, builder.data()[0], torch.device("cpu"), folder, StopRequest())


def rows(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


def below(prefix, tensors):
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@pytest.fixture
def finished(cvtrain):
    def run(*overrides):
        answer = cvtrain(*QUICK, "epochs=3", "json=true", "data.limit=400", "model.widths=[8,8]", *overrides)
        assert answer.code == 0, answer.err
        return answer

    return run


def test_the_average_is_evaluated_chosen_deployed_and_stored_beside_the_raw_weights(finished, cvtrain):
    answer = finished("averaging=ema")
    folder = answer.folder
    history = rows(folder)
    assert all(row["val/acc"] != "" and row["val_raw/acc"] != "" for row in history)
    assert any(row["val/loss"] != row["val_raw/loss"] for row in history)
    best = max(history, key=lambda row: float(row["val/acc"]))
    assert answer.json["metrics"]["val/acc"] == pytest.approx(float(best["val/acc"]))

    stored = load_file(folder / "weights" / "best.safetensors")
    average, raw = below("average/", stored), below("model/", stored)
    deployed = load_file(folder / "weights" / "model.safetensors")
    assert set(average) == {*raw, "n_averaged"}
    assert set(deployed) == set(raw)
    assert all(torch.equal(value, average[name]) for name, value in deployed.items())
    assert not torch.equal(deployed["head.weight"], raw["head.weight"])

    again = cvtrain("val", f"run={folder}", "split=val", "json=true")
    assert again.code == 0, again.err
    assert again.json["metrics"]["val/acc"] == pytest.approx(float(best["val/acc"]))
    assert again.json["metrics"]["val/loss"] == pytest.approx(float(best["val/loss"]), rel=1e-4)


def test_swa_leaves_the_epochs_before_its_start_to_the_raw_weights(finished):
    folder = finished("averaging=swa", "averaging.start=0.34", "scheduler=constant").folder
    history = rows(folder)
    assert [row["val_raw/acc"] == "" for row in history] == [True, False, False]
    stored = load_file(folder / "weights" / "last.safetensors")
    assert int(stored["average/n_averaged"]) == 2


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("kind", KINDS, ids=["ema", "ema-3", "swa"])
def test_batch_norms_statistics_are_those_of_the_pictures_under_the_averaged_weights(kind, tmp_path):
    run = built(tmp_path, "epochs=1", "model.widths=[8,8]", *kind)
    seen = []
    fit(run)
    averaged = run.averaging.model()
    # The first convolution's output over the very batches, in float64; batch norm averages over batches.
    for batch in run.loader.train_batches(0):
        images = run.eval_images(batch).double()
        outputs = nn.functional.conv2d(images, averaged.features[0].weight.double(), padding=1).numpy()
        seen.append((outputs.mean((0, 2, 3)), outputs.var((0, 2, 3), ddof=1)))
    first, raw = norms(averaged)[0], norms(run.model)[0]
    np.testing.assert_allclose(first.running_mean.numpy(), np.mean([m for m, _ in seen], axis=0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(first.running_var.numpy(), np.mean([v for _, v in seen], axis=0), rtol=1e-3, atol=1e-4)
    if kind[0] == "averaging=ema":
        assert not torch.allclose(first.running_var, raw.running_var, rtol=1e-2), "else this test could not fail"
    assert {m.momentum for m in norms(averaged)} == {0.1}
    assert not averaged.training


class EnoughError(Exception):
    pass


def stop_after(run, step):
    save = run.checkpoints.save

    def save_and_leave(stopped, best):
        save(stopped, best)
        if stopped.state.step >= step:
            run.checkpoints.wait()
            raise EnoughError

    run.checkpoints.save = save_and_leave
    with pytest.raises(EnoughError):
        fit(run)


@pytest.mark.parametrize("kind", KINDS, ids=["ema", "ema-3", "swa"])
@pytest.mark.parametrize("step", [2, 4, 7])
def test_a_run_stopped_at_any_step_ends_with_the_same_average(kind, step, tmp_path):
    settings = ["epochs=3", "limit_train_batches=4", f"save_every_steps={step}", "aug=mixup", *SMALL, *kind]
    whole = built(tmp_path / "whole", *settings)
    fit(whole)
    stop_after(built(tmp_path / "parts", *settings), step)
    rest = built(tmp_path / "parts", *settings)
    assert rest.checkpoints.restore(rest) == "last.safetensors"
    assert rest.state.step == step
    fit(rest)
    expected = whole.averaging.tensors()
    assert rest.averaging.tensors().keys() == expected.keys() != set()
    for name, value in rest.averaging.tensors().items():
        assert torch.equal(value, expected[name]), name
    assert rest.state.history == whole.state.history


def test_what_is_deployed_has_the_validation_score_that_chose_it(tmp_path):
    run = built(tmp_path, "epochs=2", "averaging=swa", "scheduler=constant", "model.widths=[8,8]")
    fit(run)
    best = run.monitor.best_row
    run.checkpoints.load_model("best.safetensors", run.model)
    run.precision = Fp32()
    metrics = evaluate(run, "val", run.model).compute()
    assert metrics["acc"] == pytest.approx(best["val/acc"])
    assert metrics["loss"] == pytest.approx(best["val/loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("option", "override", "words"),
    [
        ("ema", "decay=1.0", "is not allowed; expected a number of at least 0 and below 1"),
        ("ema", "every_steps=0", "is not allowed; expected a whole number of at least 1"),
        ("swa", "start=1", "is not allowed; expected a number of at least 0 and below 1"),
        ("ema", "start=0.5", ""),
    ],
)
def test_wrong_settings_are_refused(cvtrain, option, override, words):
    answer = cvtrain(f"averaging={option}", f"averaging.{override}")
    assert answer.code == 2
    assert f"averaging.{override.split('=')[0]}" in answer.err
    assert words in answer.err
