"""Runs with a teacher: what they learn, log, store and refuse."""

import csv
import re

import pytest
import torch
from teacher_file import DIGITS, write_teacher

from cvtrain.build import Builder
from cvtrain.command.train import build_run
from cvtrain.compose import Composer
from cvtrain.core.files import sha256
from cvtrain.core.types import Preprocess
from cvtrain.engine.loop import evaluate, fit
from cvtrain.engine.signals import StopRequest

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("threads=1", "workers=0", "device=cpu", "logger=none", "compression=none", "export=none")
SMALL = ("data.limit=300", "model.widths=[6,8]", "limit_eval_batches=1")


def built(folder, *overrides):
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    config = Composer("train", None).check([*QUICK, *SMALL, *overrides], [])[1]
    builder = Builder(config, [])
    return build_run(builder, builder.data()[0], torch.device("cpu"), folder, StopRequest())


def teacher_of(run):
    return {name: value.clone() for name, value in run.distillation.teacher.model.state_dict().items()}


def test_a_whole_run_leaves_the_teacher_alone_and_reports_both_terms(tmp_path):
    path = write_teacher(
        tmp_path / "t.safetensors", names=DIGITS[::-1], preprocess=Preprocess(12, 12, 1, (0.1,), (0.9,))
    )
    digest = sha256(path)
    run = built(tmp_path / "run", "epochs=2", "aug=mixup", "distillation=kd", f"distillation.teacher={path}")
    before = teacher_of(run)
    fit(run)
    for name, value in teacher_of(run).items():
        assert torch.equal(value, before[name]), name
    assert sha256(path) == digest == run.distillation.teacher_sha256
    for row in run.state.history:
        expected = 0.3 * row["train/task"] + 0.7 * row["train/distillation"]
        assert row["train/loss"] == pytest.approx(expected, rel=1e-4)
        assert row["train/distillation"] > 0
    names = [name for group in run.optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in run.model.named_parameters())


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


@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_run_stopped_at_any_step_ends_with_the_same_student(step, tmp_path):
    path = write_teacher(tmp_path / "t.safetensors")
    settings = ["epochs=2", "limit_train_batches=4", f"save_every_steps={step}", "aug=mixup", "averaging=ema"]
    settings += ["distillation=kd", f"distillation.teacher={path}"]
    whole = built(tmp_path / "whole", *settings)
    fit(whole)
    stop_after(built(tmp_path / "parts", *settings), step)
    rest = built(tmp_path / "parts", *settings)
    assert rest.checkpoints.restore(rest) == "last.safetensors"
    assert rest.state.step == step
    fit(rest)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name
    assert rest.state.history == whole.state.history


def test_a_teacher_is_asked_for_before_torch_is_imported(cvtrain):
    answer = cvtrain("distillation=kd")
    assert answer.code == 2
    assert "distillation=kd has no teacher; give distillation.teacher=FOLDER" in answer.err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("temperature=0", "expected a number above 0"),
        ("teacher_weight=1.5", "expected a number of at least 0 and at most 1"),
    ],
)
def test_wrong_settings_are_refused(cvtrain, override, words):
    answer = cvtrain("distillation=kd", "distillation.teacher=somewhere", f"distillation.{override}")
    assert answer.code == 2
    assert words in answer.err


def test_a_missing_teacher_ends_the_run_before_its_first_epoch(cvtrain):
    answer = cvtrain(*QUICK, "distillation=kd", "distillation.teacher=nowhere", "epochs=1", "json=true")
    assert answer.code == 4
    assert answer.err.count("\n") <= 3
    assert "distillation.teacher=nowhere does not exist" in answer.err
    assert not (answer.folder / "results.csv").exists()


def test_a_path_is_taken_as_it_is_printed(cvtrain, tmp_path):
    path = write_teacher(tmp_path / "lr=0.1,seed=2 (old)" / "t.safetensors")
    answer = cvtrain(*QUICK, *SMALL, "epochs=1", "distillation=kd", f"distillation.teacher={path}", "json=true")
    assert answer.code == 0, answer.err
    log = (answer.folder / "train.log").read_text()
    assert f"teacher {path}, SHA-256 {sha256(path)}" in log
    assert {"train/task", "train/distillation"} <= set(next(csv.reader((answer.folder / "results.csv").open())))


def test_a_resume_notices_another_teacher(cvtrain, tmp_path):
    path = write_teacher(tmp_path / "t.safetensors")
    given = [*QUICK, *SMALL, "distillation=kd", f"distillation.teacher={path}", "json=true", "scheduler=constant"]
    first = cvtrain(*given, "epochs=1")
    assert first.code == 0, first.err
    write_teacher(path, seed=8)
    again = [*given, "epochs=2", f"resume={first.folder}"]
    refused = cvtrain(*again)
    assert refused.code == 2
    assert re.search(r"has other weights than when this run began: SHA-256 \w{64}, not \w{64}", refused.err)
    allowed = cvtrain(*again, "resume_allow=[distillation.teacher]")
    assert allowed.code == 0, allowed.err
    assert "goes on with another teacher" in (first.folder / "train.log").read_text()


@pytest.mark.slow
def test_a_small_student_learns_from_a_trained_run(cvtrain, tmp_path):
    """A student with a thirtieth of the parameters and 150 labels gains from a teacher, in the mean of three seeds."""
    taught = cvtrain(*QUICK, "epochs=12", "json=true")
    assert taught.json["metrics"]["test/acc"] > 0.97
    small = ["model.widths=[4,8]", "data.limit=150", "batch_size=32", "epochs=12", "limit_eval_batches=null"]
    scores = {}
    for name, extra in (("alone", []), ("taught", ["distillation=kd", f"distillation.teacher={taught.folder}"])):
        runs = [built(tmp_path / name / str(seed), *small, *extra, f"seed={seed}") for seed in (1, 2, 3)]
        for run in runs:
            fit(run)
        scores[name] = sum(evaluate(run, "test").compute()["acc"] for run in runs) / 3
    assert scores["taught"] > scores["alone"], scores
