"""`debug=overfit`: a sound model passes, and each way to fail has its advice."""

import pytest
import torch
from engine_parts import make_run, network
from torch import nn

from cvtrain.aug import Augmentation
from cvtrain.engine import overfit
from cvtrain.engine.loop import fit
from cvtrain.errors import GateError
from cvtrain.loss import CrossEntropy
from cvtrain.scheduler import Constant
from cvtrain.task import Classification


def trial(folder, model=None, **changes):
    settings = {
        "augmentation": Augmentation({}, {}),
        "task": Classification(CrossEntropy(), [], 3),
        "schedule": Constant(),
        "grad_accum_steps": 1,
        "epochs": 10,
        "batch_size": 8,
        "model": model or network(),
    }
    run = make_run(folder, **{**settings, **changes})
    overfit.prepare(run)
    return run


def test_a_sound_model_learns_one_batch_by_heart_and_then_stops(tmp_path):
    run = trial(tmp_path)
    fit(run)
    assert run.state.epoch < 10
    assert run.state.step == 30 * run.state.epoch
    assert "debug=overfit PASSED: one batch is learnt by heart" in overfit.verdict(run)
    last = run.state.history[-1]
    assert last["val/acc"] == 1.0
    assert last["train/loss"] <= 0.05


def test_every_step_and_the_evaluation_see_the_same_pictures_as_the_first_step_of_a_run(tmp_path):
    plain = make_run(tmp_path / "plain", batch_size=8)
    first = next(plain.loader.train_batches(0, 0, 6))
    run = trial(tmp_path / "trial")
    seen = [*run.loader.train_batches(3, 28, 6), *run.loader.eval_batches("val")]
    assert len(seen) == 3
    for batch in seen:
        assert torch.equal(batch.images, first.images)
        assert torch.equal(batch.targets, first.targets)
    seen[0].images.zero_()
    assert torch.equal(seen[1].images, first.images), "an augmentation that writes into its input spoils nothing"


def test_dropout_is_off(tmp_path):
    run = trial(tmp_path, network(dropout=0.9))
    assert [m.p for m in run.model.modules() if isinstance(m, nn.Dropout)] == [0.0]


class Blind(nn.Module):
    """Sees nothing of the pictures."""

    def __init__(self):
        super().__init__()
        self.answer = nn.Linear(1, 3)

    def forward(self, images):
        return self.answer(images.new_zeros(len(images), 1))


def test_a_model_that_cannot_see_fails_with_advice_about_rate_and_labels(tmp_path):
    run = trial(tmp_path, Blind(), epochs=2)
    fit(run)
    with pytest.raises(GateError, match="FAILED") as failed:
        overfit.verdict(run)
    assert failed.value.exit_code == 10
    assert "inspect what=lr" in str(failed.value)
    assert len(str(failed.value).splitlines()) <= 3


def test_statistics_of_batch_norm_that_stay_behind_are_named(tmp_path):
    model = network()
    model[1].momentum = 0.0  # 0.01 does the same to a short run
    model[1].running_mean.fill_(5)
    run = trial(tmp_path, model, epochs=3)
    fit(run)
    with pytest.raises(GateError, match="batch norm"):
        overfit.verdict(run)


def test_a_loss_that_falls_too_slowly_asks_for_epochs_or_another_rate(tmp_path):
    run = trial(tmp_path, epochs=2, base_lr=2e-3)
    fit(run)
    with pytest.raises(GateError, match="give it more epochs"):
        overfit.verdict(run)
