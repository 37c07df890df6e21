"""Memory that runs out in the middle of a step."""

import pytest
import torch
from engine_parts import make_run, network, sets
from torch import nn

from cvtrain.engine.loop import fit
from cvtrain.scheduler import Constant


class Hungry(nn.Module):
    """The network on a device that has room for `room` pictures in training."""

    def __init__(self, room, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.room = network(norm=norm, dropout=0.0), room

    def forward(self, images):
        if self.training and len(images) > self.room:
            self.inner(images)  # what it did before memory ran out must leave no trace
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.inner(images)


def hungry_run(folder, room, **changes):
    return make_run(
        folder, sets(22), Hungry(room, changes.pop("norm", False)), batch_size=8, grad_accum_steps=1, epochs=2,
        schedule=Constant(), mix=False, **changes,
    )  # fmt: skip


def test_the_micro_batch_is_halved_until_it_fits_and_the_steps_stay_what_they_were(tmp_path, caplog):
    small, large = hungry_run(tmp_path / "s", 3, on_oom="microbatch"), hungry_run(tmp_path / "l", 99)
    fit(small)
    fit(large)
    assert small.state.parts == 4
    assert small.state.step == large.state.step == 6
    for (name, a), b in zip(small.model.named_parameters(), large.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=0), name
    for a, b in zip(small.state.history, large.state.history, strict=True):
        assert b == pytest.approx(a, abs=1e-5)
    assert [m.split(":")[0] for m in caplog.messages if "memory" in m] == ["out of memory at step 0"] * 2
    assert "batch norm" not in caplog.text


def test_batch_norm_is_warned_of(tmp_path, caplog):
    fit(hungry_run(tmp_path, 4, norm=True, on_oom="microbatch"))
    assert "but batch norm sees smaller ones" in caplog.text


def test_it_is_recorded_for_the_resume(tmp_path):
    run = hungry_run(tmp_path, 4, on_oom="microbatch")
    fit(run)
    again = hungry_run(tmp_path, 4, on_oom="microbatch")
    again.checkpoints.restore(again)
    assert again.state.parts == 2


def test_it_is_not_done_unless_asked_for_and_not_without_end(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        fit(hungry_run(tmp_path / "a", 4))
    with pytest.raises(torch.OutOfMemoryError):
        fit(hungry_run(tmp_path / "b", 0, on_oom="microbatch"))


def test_other_errors_are_not_mistaken_for_it(tmp_path):
    class Broken(Hungry):
        def forward(self, images):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        fit(make_run(tmp_path, model=Broken(1), on_oom="microbatch"))


@pytest.mark.parametrize("norm", [False, True])
def test_a_short_last_micro_batch_is_cut_into_fewer_parts_none_of_one_picture(tmp_path, norm):
    run = make_run(tmp_path, sets(22), network(norm=norm), mix=False, grad_accum_steps=1)  # batches of 4, the last of 2
    run.state.parts = 4
    fit(run)
    assert run.state.step == 12


def test_what_batch_norm_saw_before_memory_ran_out_is_taken_back(tmp_path):
    run = hungry_run(tmp_path, 4, norm=True, on_oom="microbatch")
    fit(run)
    assert int(run.model.inner[1].num_batches_tracked) == 2 * run.state.step  # two parts a step
