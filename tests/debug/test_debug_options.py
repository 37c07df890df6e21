"""Each `debug` option does what its line in --help says, as a user runs it."""

import gzip
import json
import time

import pytest

from cvtrain.compose import Composer
from cvtrain.data.source import ArraySource

pytestmark = pytest.mark.usefixtures("one_thread")


def composed(*overrides):
    return Composer("train", None).check(list(overrides), [])[1]


def test_overfit_takes_augmentation_and_regularizers_away_and_the_command_line_may_bring_them_back():
    config = composed("debug=overfit")
    assert config["aug"]["sample"] == {}
    assert config["regularizer"] == {}
    assert config["scheduler"]["_target_"].endswith(".Constant")
    assert config["overfit_batch"] is True
    assert composed("debug=overfit", "regularizer=[label_smoothing]")["regularizer"] != {}
    assert composed("debug=overfit", "data=folder", "data.root=x")["aug"]["sample"] == {}, "not the data set's own"


def test_limit_and_profiler_neither_compress_nor_export_and_fdr_takes_part_in_everything():
    for option in ("limit", "profiler"):
        config = composed(f"debug={option}")
        assert config["compression"] == {}
        assert config["export"] == {}
    config = composed("debug=fdr")
    assert (config["epochs"], config["limit_train_batches"], config["limit_eval_batches"]) == (1, 2, 2)
    assert config["compression"] != {}
    assert config["export"] != {}


def test_without_debug_nothing_is_traced_measured_or_overfitted():
    config = composed()
    assert [config[key] for key in ("profile", "log_gradients", "overfit_batch")] == [False] * 3


def test_overfit_passes_on_the_default_model_and_leaves_the_curves(cvtrain):
    answer = cvtrain("debug=overfit", "device=cpu", "json=true")
    assert answer.code == 0, answer.err
    assert "debug=overfit PASSED" in answer.err
    assert answer.json["metrics"]["val/acc"] == 1.0
    assert answer.json["artifacts"] == []
    assert (answer.folder / "results.png").exists()
    assert not (answer.folder / "predictions.csv").exists(), "the test set is not touched"


@pytest.mark.slow
def test_overfit_fails_with_code_10_and_advice_when_the_rate_is_far_too_small(cvtrain):
    answer = cvtrain("debug=overfit", "device=cpu", "optimizer.lr=1e-7", "epochs=1", "json=true")
    assert answer.code == 10
    assert "debug=overfit FAILED" in answer.err
    assert "cvtrain inspect what=lr" in answer.err
    assert json.loads((answer.folder / "status.json").read_text())["exit_code"] == 10


@pytest.mark.slow
def test_the_profiler_writes_a_trace_and_says_where_the_time_goes(cvtrain):
    answer = cvtrain("debug=profiler", "device=cpu", "limit_train_batches=12", "json=true")
    assert answer.code == 0, answer.err
    for name in ("waiting for data", "augmentation", "forward pass", "backward pass", "evaluation", "checkpoint"):
        assert name in answer.err
    assert "shares of an epoch of 20" in answer.err, "of a whole one, whatever was limited"
    assert "-bound: " in answer.err or " of the time: " in answer.err
    with gzip.open(answer.folder / "trace.json.gz", "rt") as file:
        assert {"forward", "backward"} <= {event.get("name") for event in json.load(file)["traceEvents"]}


@pytest.mark.slow
def test_gradients_are_shown_and_written_each_epoch(cvtrain):
    answer = cvtrain("debug=gradients", "epochs=2", "compression=none", "export=none", "device=cpu", "json=true")
    assert answer.code == 0, answer.err
    assert "last step of epoch 2" in answer.err
    assert "head.weight" in answer.err
    lines = (answer.folder / "gradients.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,step,parameter,shape,weight_norm,grad_norm,grad_weight_ratio,update_ratio")
    assert {line.split(",")[0] for line in lines[1:]} == {"1", "2"}


def test_per_step_values_reach_the_log_every_so_many_steps(cvtrain):
    answer = cvtrain(
        *("epochs=1", "log_every_steps=7", "logger=jsonl", "compression=none", "export=none", "device=cpu"), "json=true"
    )
    assert answer.code == 0, answer.err
    lines = [json.loads(line) for line in (answer.folder / "metrics.jsonl").read_text().splitlines()]
    per_step = {line["step"] for line in lines if "train/loss_step" in line}
    assert per_step == {7, 14}
    rates = [line["images_per_s_step"] for line in lines if "images_per_s_step" in line]
    assert len(rates) == 2
    assert all(rate > 100 for rate in rates)
    (epoch,) = [line for line in lines if "val/acc" in line]
    assert epoch["step"] == 20
    assert "train/grad_norm" in epoch


@pytest.mark.slow
def test_a_run_that_waits_for_its_pictures_is_told_so(cvtrain, monkeypatch):
    read = ArraySource.read

    def slow(self, indices):
        time.sleep(0.3)
        return read(self, indices)

    monkeypatch.setattr(ArraySource, "read", slow)
    answer = cvtrain("debug=limit", "epochs=2", "limit_train_batches=4", "loader=host", "workers=0", "device=cpu")
    assert answer.code == 0, answer.err
    assert answer.out.count("data-bound: ") == 1
    assert "loader=device" in answer.out
