"""Phases of image sizes: their plan, their learning rates, the pictures they give, and their errors."""

import numpy as np
import pytest
import torch
from PIL import Image

from cvtrain.errors import ConfigError
from cvtrain.resizing import Constant, Progressive, shrunk

PHASES = {
    "small": {"img_size": 8, "epochs": 3, "lr": 0.4},
    "medium": {"img_size": 16, "epochs": 2, "lr": 0.2},
    "full": {"img_size": None, "epochs": 1, "lr": None},
}


def test_an_epoch_belongs_to_one_phase():
    plan = Progressive(PHASES, epochs=6, img_size=32)
    assert [plan.phase(epoch).img_size for epoch in range(8)] == [8, 8, 8, 16, 16, 32, 32, 32]
    assert [plan.phase(epoch).lr for epoch in range(6)] == [0.4, 0.4, 0.4, 0.2, 0.2, None]
    assert [plan.phase(epoch).first for epoch in range(6)] == [0, 0, 0, 3, 3, 5]


def test_without_phases_all_epochs_have_the_runs_size():
    plan = Constant(epochs=4, img_size=20)
    assert {plan.phase(epoch).img_size for epoch in range(5)} == {20}


def test_epochs_that_do_not_add_up_and_sizes_above_the_runs_are_refused():
    with pytest.raises(ConfigError, match=r"3 \+ 2 \+ 1 = 6 epochs.*\n.*set epochs=6"):
        Progressive(PHASES, epochs=10, img_size=32)
    with pytest.raises(ConfigError, match=r"medium\.img_size=16 is above the run's img_size=12"):
        Progressive(PHASES, epochs=6, img_size=12)
    with pytest.raises(ConfigError, match="0 = 0 epochs"):
        Progressive({}, epochs=6, img_size=32)


def test_a_phase_can_be_removed_by_null():
    plan = Progressive({**PHASES, "medium": None}, epochs=4, img_size=32)
    assert [plan.phase(epoch).img_size for epoch in range(4)] == [8, 8, 8, 32]


def test_shrinking_equals_pillows_bilinear_within_one_level():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    small = shrunk(torch.from_numpy(pixels).permute(0, 3, 1, 2), 17)
    for i in range(2):
        expected = np.asarray(Image.fromarray(pixels[i]).resize((17, 17), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(small[i].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


RUN = ["data=digits", "resizing=progressive", "img_size=16", "compression=none", "export=none", "device=cpu"]
SMALL = ["resizing.phases.small.img_size=8", "resizing.phases.medium.img_size=12", "limit_train_batches=3"]
TINY = ["model=mobilenet_v1", "batch_size=16", "limit_eval_batches=1", "json=true"]
EPOCHS = [f"resizing.phases.{name}.epochs=2" for name in ("small", "medium", "full")]
RATES = ["resizing.phases.small.lr=0.08", "resizing.phases.medium.lr=0.04", "resizing.phases.full.lr=0.01"]


@pytest.mark.usefixtures("one_thread")
def test_three_phases_train_in_one_command_and_the_log_has_the_rate_of_each(cvtrain):
    answer = cvtrain(*RUN, *SMALL, *EPOCHS, *RATES, "epochs=6", *TINY)
    assert answer.code == 0, answer.err
    log = (answer.folder / "train.log").read_text()
    for first, last, size, rate in ((1, 2, 8, "0.08"), (3, 4, 12, "0.04"), (5, 6, 16, "0.01")):
        assert f"epochs {first} to {last} at {size}×{size}, lr {rate}" in log


@pytest.mark.usefixtures("one_thread")
def test_a_model_that_takes_one_size_only_is_refused_by_phase(cvtrain):
    answer = cvtrain(*RUN, *SMALL, *EPOCHS, "epochs=6", "model=lenet5", "img_size=28")
    assert answer.code == 2
    assert "resizing.phases.small.img_size=8" in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.slow
def test_a_network_of_one_size_is_refused_with_the_phase(cvtrain):
    answer = cvtrain(
        "model=vit_b_16",
        "img_size=32",
        "resizing=progressive",
        *("resizing.phases.small.img_size=16", "resizing.phases.medium=null", "epochs=16"),
    )
    assert answer.code == 2
    assert "this model does not take that size" in answer.err
