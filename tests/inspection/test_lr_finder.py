"""The learning-rate range test: against a quadratic whose threshold is known, and on digits."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image

from cvtrain.inspection.lr_finder import HIGHEST, LOWEST, range_test

pytestmark = pytest.mark.usefixtures("one_thread")


def two_batches(curvature):
    """Gradient descent on λ/2 (w - c)², c = ±1 in turn.

    At a rate η it settles at w = ±ηλ/(2 - ηλ), where the loss is λ/2 · (2/(2 - ηλ))²: four times its least at η = 1/λ,
    and without a bound at 2/λ.
    """
    state = {"w": 3.0, "target": 1.0}

    def step(lr):
        state["target"] = -state["target"]
        distance = state["w"] - state["target"]
        state["w"] -= lr * curvature * distance
        return 0.5 * curvature * distance**2

    return step


@pytest.mark.parametrize("curvature", [1.0, 10.0, 100.0, 1e4])
def test_on_a_quadratic_the_end_lies_below_two_over_the_curvature_and_the_suggestion_far_below(curvature):
    found = range_test(two_batches(curvature), 400)
    threshold = 2 / curvature
    factor = (HIGHEST / LOWEST) ** (1 / 399)
    assert threshold / 2 < found.diverged < threshold * factor, "where four times the least loss is reached"
    assert threshold / 40 < found.suggestion < threshold / 4
    middle = int(np.argmin(abs(found.lrs - 0.5 / curvature)))
    assert found.losses[middle] == pytest.approx(curvature / 2 * (2 / 1.5) ** 2, rel=0.05)
    assert found.lrs[-1] == found.diverged
    assert found.losses[-1] > 4 * found.losses.min()


def test_the_rates_grow_by_one_factor_and_the_losses_are_those_of_the_steps():
    seen = []
    found = range_test(lambda lr: seen.append(lr) or 1.0 / len(seen), 50)
    np.testing.assert_allclose(found.lrs, [1e-6 * 10 ** (7 * i / 49) for i in range(50)])
    assert seen == found.lrs.tolist()
    np.testing.assert_allclose(found.losses, [1 / n for n in range(1, 51)])
    assert found.diverged is None


def test_smoothing_is_a_centred_mean_that_does_not_lag():
    found = range_test(lambda lr: 1 + abs(math.log10(lr) + 2), 141)  # a V with its tip at 0.01
    assert found.lowest == pytest.approx(0.01, rel=1e-6)
    middle = found.losses[50 - 3 : 50 + 4]
    assert found.smoothed[50] == pytest.approx(middle.mean())


def test_the_steepest_rate_is_where_the_loss_falls_fastest():
    found = range_test(lambda lr: 2 - math.tanh(3 * (math.log10(lr) + 3)), 141)
    assert found.steepest == pytest.approx(1e-3, rel=0.2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_test(bad):
    found = range_test(lambda lr: bad if lr > 0.1 else 1.0 - lr, 71)
    assert found.diverged == found.lrs[-1] == pytest.approx(0.1259, rel=1e-3)
    assert np.isfinite(found.smoothed).all()
    assert found.suggestion < 0.1


def test_a_flat_loss_is_not_taken_for_one_that_falls():
    noise = np.random.default_rng(0).normal(0, 0.01, 100)
    assert not range_test(lambda lr: 2.3 + noise[round(math.log10(lr / 1e-6) / 7 * 99)], 100).falls
    assert range_test(two_batches(10.0), 200).falls


def test_the_verb_writes_curve_and_picture_and_prints_the_override(cvtrain):
    answer = cvtrain("inspect", "what=lr", "device=cpu", "aug=none", "batch_size=32", "steps=60", "json=true")
    assert answer.code == 0, answer.err
    told = answer.json
    assert set(told["files"]) == {path.name for path in answer.folder.iterdir()}, "and nothing else"
    key, value = told["override"].split("=")
    assert key == "optimizer.lr"
    assert float(value) == told["lr"]["suggested"]
    assert 1e-3 < float(value) < 0.2
    with (answer.folder / "lr_finder.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert 30 <= len(rows) <= 60
    assert float(rows[0]["lr"]) == 1e-6
    assert float(rows[0]["loss"]) == pytest.approx(math.log(10), abs=0.3), "untrained weights know nothing"
    with Image.open(answer.folder / "lr_finder.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_the_override_stands_on_a_line_of_its_own_before_the_folder(cvtrain):
    answer = cvtrain("inspect", "what=lr", "device=cpu", "steps=20", "limit_train_batches=3")
    assert answer.code == 0, answer.err
    override, folder = answer.out.strip().splitlines()[-2:]
    assert override.startswith("optimizer.lr=")
    assert folder == str(answer.folder)
    assert answer.folder.is_dir()


def contents(folder):
    """All files but train.log: within one process Hydra's handler of the run before stays in place."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "train.log"}


def test_it_takes_the_overrides_of_the_training_and_leaves_the_run_alone(cvtrain):
    trained = cvtrain("debug=fdr", "name=mine", "compression=none", "export=none", "optimizer=adamw", "json=true")
    assert trained.code == 0, trained.err
    before = contents(trained.folder)
    answer = cvtrain("inspect", "what=lr", "debug=fdr", "name=mine", "optimizer=adamw", "patience=3", "steps=20")
    assert answer.code == 0, answer.err
    assert contents(trained.folder) == before


def test_too_few_steps_are_refused(cvtrain):
    answer = cvtrain("inspect", "what=lr", "steps=5")
    assert answer.code == 2
    assert "steps=5" in answer.err


@pytest.mark.slow
def test_the_suggestion_trains_better_than_a_thirtieth_and_thirty_times_of_it(cvtrain):
    found = cvtrain("inspect", "what=lr", "device=cpu", "json=true").json["lr"]["suggested"]
    losses = {}
    for factor in (1 / 30, 1, 30):
        answer = cvtrain(
            f"optimizer.lr={found * factor}", "epochs=6", "compression=none", "export=none", "device=cpu", "json=true"
        )
        told = json.loads(answer.last) if answer.code == 0 else {"metrics": {}}
        losses[factor] = told["metrics"].get("test/loss", math.inf)
    assert losses[1] < losses[1 / 30]
    assert losses[1] < losses[30]
