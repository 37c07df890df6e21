"""A loss or gradient that is not finite: nothing of it reaches the weights, and its pictures are kept."""

import json
import math

import pytest
import torch
from engine_parts import adamw, make_run, network, sets, sgd
from safetensors.torch import load_file
from torch import nn

from cvtrain.engine.loop import fit
from cvtrain.errors import DivergedError

SPOILT_AT = 4


def fused_sgd(groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, fused=True)


def fused_adamw(groups):
    return torch.optim.AdamW(groups, lr=0.02, fused=True)


class Spoilt(nn.Module):
    """The network, whose answers are multiplied by `value` in some optimizer steps of training, two batches each."""

    def __init__(self, value, steps=(SPOILT_AT,), norm=True):
        super().__init__()
        self.inner, self.value, self.steps, self.calls = network(norm=norm), value, steps, 0

    def forward(self, images):
        output = self.inner(images)
        if self.training:
            self.calls += 1
            if (self.calls - 1) // 2 in self.steps:
                return output * self.value
        return output


class RootAtZero(Spoilt):
    """A finite loss with a gradient of NaN."""

    def forward(self, images):
        output = self.inner(images)
        if self.training:
            self.calls += 1
            if (self.calls - 1) // 2 in self.steps:
                return output + (output * 0).sqrt()
        return output


def weights_of(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def before_the_spoilt_step(folder, optimizer, model):
    """The weights of a run that ends just before it."""
    run = make_run(folder, model=model, optimizer=optimizer, epochs=2, save_every_steps=1, mix=False)
    weights = []
    save = run.checkpoints.save

    def watched(*args, **kwargs):
        weights.append(weights_of(run))
        save(*args, **kwargs)

    run.checkpoints.save = watched
    with pytest.raises(DivergedError):
        fit(run)
    assert run.state.step == SPOILT_AT + 1  # it was found at the next save
    return weights[-1]


@pytest.mark.parametrize("optimizer", [sgd, adamw, fused_sgd, fused_adamw])
@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_the_weights_stay_those_of_before_however_late_the_host_looks(tmp_path, optimizer, kind):
    def model():
        torch.manual_seed(0)
        return RootAtZero(1.0) if kind == "gradient" else Spoilt(float(kind))

    expected = before_the_spoilt_step(tmp_path / "a", optimizer, model())
    run = make_run(tmp_path / "b", sets(22), model(), optimizer=optimizer, epochs=2, mix=False)
    start = weights_of(run)
    with pytest.raises(DivergedError, match=r"(?s)not finite at epoch 2, step 5, lr .*clip_grad_norm=1\.0") as caught:
        fit(run)
    assert caught.value.exit_code == 5
    assert run.state.step == SPOILT_AT + 2  # the whole epoch had passed
    for name, value in weights_of(run).items():
        assert torch.equal(value, expected[name]), name
        assert value.ndim == 1 or not torch.equal(value, start[name])
    saved = make_run(tmp_path / "b", model=model(), optimizer=optimizer)
    assert saved.checkpoints.restore(saved) == "last.safetensors"
    assert (saved.state.epoch, saved.state.step) == (1, 3)


def test_the_pictures_of_the_step_are_kept(tmp_path):
    settling = 3  # six batches of the first epoch, on which batch norm settles because MixUp is on
    run = make_run(tmp_path / "weights", model=Spoilt(math.nan, (SPOILT_AT + settling,)), epochs=2)
    with pytest.raises(DivergedError):
        fit(run)
    told = json.loads((tmp_path / "diverged.json").read_text())
    assert (told["step"], told["epoch"]) == (SPOILT_AT + 1, 2)
    batches = list(run.loader.train_batches(1))[2:4]
    assert told["pictures"] == [str(i) for batch in batches for i in batch.indices]
    assert len(told["losses_with_these_weights"]) == 2
    kept = load_file(tmp_path / "diverged.safetensors")
    for i, batch in enumerate(batches):
        images = run.train_images(batch, 1)
        expected = run.augmentation.mix(images, run.task.encode(batch.targets), 5, SPOILT_AT * 2 + i, 0)
        assert torch.equal(kept[f"images/{i}"], expected[0])
        assert torch.equal(kept[f"targets/{i}"], expected[1])


@pytest.mark.parametrize("optimizer", [sgd, fused_sgd])
def test_a_step_that_is_skipped_is_counted_and_leaves_weights_statistics_and_means_alone(tmp_path, optimizer):
    run = make_run(tmp_path, model=Spoilt(math.nan, (1, 4)), optimizer=optimizer, epochs=3, on_nan="skip", mix=False)
    fit(run)
    assert [row.get("train/skipped") for row in run.state.history] == [1.0, 1.0, None]
    assert all(math.isfinite(value) for row in run.state.history for value in row.values())
    assert all(torch.isfinite(value.float()).all() for value in run.model.state_dict().values())
    assert run.state.step == 9
    twin = make_run(tmp_path / "t", model=Spoilt(1.0), optimizer=optimizer, epochs=3, on_nan="skip", mix=False)
    fit(twin)
    assert twin.state.history[0] != run.state.history[0]


def test_statistics_of_a_skipped_step_are_taken_back(tmp_path):
    class Poison(Spoilt):
        """Not finite before batch norm, as a picture with a NaN would be."""

        def forward(self, images):
            if self.training:
                self.calls += 1
                if (self.calls - 1) // 2 in self.steps:
                    images = images * math.nan
            return self.inner(images)

    run = make_run(tmp_path, model=Poison(1.0, (1,)), optimizer=fused_sgd, on_nan="skip", mix=False)
    fit(run)
    assert run.state.history[0]["train/skipped"] == 1.0
    assert all(torch.isfinite(value.float()).all() for value in run.model.state_dict().values())
    assert math.isfinite(run.state.history[-1]["val/loss"])


def test_an_epoch_without_a_finite_step_ends_the_run_also_when_steps_may_be_skipped(tmp_path):
    run = make_run(tmp_path, model=Spoilt(math.nan, range(99)), on_nan="skip", mix=False)
    with pytest.raises(DivergedError, match="no step of epoch 1"):
        fit(run)
    assert not (tmp_path / "last.safetensors").exists()


def test_pictures_that_cannot_be_kept_do_not_hide_that_the_run_diverged(tmp_path, caplog):
    (tmp_path / "diverged.json").mkdir()
    run = make_run(tmp_path / "weights", model=Spoilt(math.nan), mix=False)
    with pytest.raises(DivergedError):
        fit(run)
    assert "could not be kept" in caplog.text
