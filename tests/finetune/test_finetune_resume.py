"""Unfreezing by phases, killed and resumed in the middle of each."""

import os
import signal

import pytest
import torch
from finetune_parts import everything, progressive, run_of, stages_of, with_state

from cvtrain.averaging import Ema, Swa
from cvtrain.engine.checkpoint import LAST
from cvtrain.engine.loop import fit
from cvtrain.engine.signals import StopRequest
from cvtrain.errors import Interrupted
from cvtrain.scheduler import OneCycle, Plateau

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "optimizer", "averaging", "schedule", "steps"),
    [
        ("simple_cnn", "sgd", Ema, OneCycle, (1, 2, 3, 4, 5, 6, 7, 8)),
        ("resnet", "adamw", Ema, lambda: Plateau(0.5, 0), (2, 5, 7)),
        pytest.param("vit", "muon", Swa, OneCycle, (2, 4, 8), marks=pytest.mark.slow),
        pytest.param("mobilenet", "sgd", Ema, OneCycle, (1, 5, 8), marks=pytest.mark.slow),
    ],
)
def test_a_resume_within_any_phase_equals_the_uninterrupted_run_to_the_bit(
    tmp_path, name, optimizer, averaging, schedule, steps
):
    def make(folder, seed=0, **changes):
        parts = {"averaging": averaging(0.3), "schedule": schedule(), **changes}
        return run_of(folder, name, progressive(name), optimizer, epochs=3, seed=seed, **parts)

    whole = make(tmp_path / "whole")
    fit(whole)
    expected = everything(whole)
    for step in steps:
        folder = tmp_path / str(step)
        with StopRequest() as stop:
            cut = make(folder, stop=stop)
            cut.display.step = lambda run, step=step: run.state.step == step and os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Interrupted):
                fit(cut)
        rest = make(folder, seed=9)
        assert rest.checkpoints.restore(rest) == LAST
        assert rest.state.step == step
        assert with_state(rest) == with_state(cut)
        fit(rest)
        assert everything(rest) == expected, step


def test_a_checkpoint_keeps_optimizer_state_only_of_what_has_trained(tmp_path):
    run = run_of(tmp_path, "simple_cnn", progressive("simple_cnn"), epochs=3)
    run.options = type(run.options)(**{**vars(run.options), "epochs": 1})
    fit(run)
    tensors, _ = run.checkpoints.read(LAST)
    kept = {name.split("/")[1] for name in tensors if name.startswith("optimizer/")}
    assert kept == set(stages_of("simple_cnn")[-1].parameters)
    assert all(torch.is_tensor(value) for value in tensors.values())
