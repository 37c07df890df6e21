"""Learning rates against torch's own schedulers, step by step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.optim import lr_scheduler

from cvtrain.engine.monitor import Monitor
from cvtrain.report.plots import learning_rate
from cvtrain.resizing import Constant as OnePhase
from cvtrain.resizing import Progressive
from cvtrain.scheduler import (
    Clock,
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    MultiStep,
    OneCycle,
    Plateau,
    Polynomial,
    Schedule,
    Step,
)

OPTIONS = sorted((Path(__file__).resolve().parents[2] / "configs" / "scheduler").glob("*.yaml"))
BASE, EPOCHS, STEPS = 0.37, 12, 7
TOTAL = EPOCHS * STEPS


def ours(schedule, epochs=EPOCHS, steps=STEPS):
    return [schedule.lr(BASE, Clock(step, steps, epochs)) for step in range(epochs * steps)]


def torchs(make, count=TOTAL, every=1):
    """The rates at which torch takes `count` steps when its scheduler moves after each `every` of them."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = make(optimizer)
    rates = []
    for step in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % every == 0 and step + 1 < count:
            scheduler.step()
    return rates


def test_constant_is_torchs_constant_lr():
    assert ours(Constant()) == torchs(lambda o: lr_scheduler.ConstantLR(o, factor=1.0)) == [BASE] * TOTAL


@pytest.mark.parametrize(("step_epochs", "gamma"), [(10, 0.5), (3, 0.1), (1, 0.9), (50, 0.5)])
def test_step_is_torchs_step_lr(step_epochs, gamma):
    expected = torchs(lambda o: lr_scheduler.StepLR(o, step_epochs, gamma), every=STEPS)
    assert ours(Step(step_epochs, gamma)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("milestones", [[12, 18], [3, 7], [7, 3], [1], [5, 5, 8], [50]])
def test_multistep_is_torchs_multi_step_lr_of_every_epoch(milestones):
    expected = torchs(lambda o: lr_scheduler.MultiStepLR(o, milestones, 0.1), every=STEPS)
    assert ours(MultiStep(milestones, 0.1)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.9, 0.5, 1.0])
def test_exponential_is_torchs_exponential_lr_at_each_epoch_and_in_small_steps_between(gamma):
    found = ours(Exponential(gamma))
    by_epoch = torchs(lambda o: lr_scheduler.ExponentialLR(o, gamma), every=STEPS)
    by_step = torchs(lambda o: lr_scheduler.ExponentialLR(o, gamma ** (1 / STEPS)))
    assert found[::STEPS] == pytest.approx(by_epoch[::STEPS], rel=1e-9)
    assert found == pytest.approx(by_step, rel=1e-9)


@pytest.mark.parametrize("power", [0.9, 1.0, 2.0])
def test_polynomial_is_torchs_polynomial_lr_of_every_step(power):
    expected = torchs(lambda o: lr_scheduler.PolynomialLR(o, TOTAL, power))
    assert ours(Polynomial(power)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("first", "factor", "min_lr"), [(10, 2, 1e-6), (1, 2, 0.0), (3, 1, 1e-3), (2, 3, 0.0)])
def test_cosine_restarts_is_torchs_warm_restarts_moved_by_fractions_of_an_epoch(first, factor, min_lr):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, first, factor, min_lr)
    expected = []
    for step in range(40 * STEPS):
        scheduler.step(step / STEPS)
        expected.append(optimizer.param_groups[0]["lr"])
    found = ours(CosineRestarts(first, factor, min_lr), epochs=40)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found.count(BASE) == {(10, 2): 3, (1, 2): 6, (3, 1): 14, (2, 3): 4}[first, factor]


@pytest.mark.parametrize("min_lr", [0.0, 1e-3])
def test_cosine_is_torchs_cosine_annealing_lr_of_every_step(min_lr):
    expected = torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, min_lr))
    assert ours(Cosine(min_lr)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("pct_start", "div", "final"), [(0.3, 25.0, 1e4), (0.5, 10.0, 100.0), (0.05, 25.0, 1e4)])
@pytest.mark.parametrize(("epochs", "steps"), [(12, 7), (1, 21), (24, 17)])
def test_onecycle_is_torchs_one_cycle_lr(pct_start, div, final, epochs, steps):
    count = epochs * steps

    def make(optimizer):
        return lr_scheduler.OneCycleLR(
            optimizer, BASE, count, pct_start=pct_start, div_factor=div, final_div_factor=final, cycle_momentum=False
        )

    found = ours(OneCycle(pct_start, div, final), epochs, steps)
    assert found == pytest.approx(torchs(make, count), rel=1e-9, abs=1e-15)
    assert found[0] == pytest.approx(BASE / div, rel=0.2)
    assert found[-1] == pytest.approx(BASE / div / final)


@pytest.mark.parametrize(
    ("epochs", "steps", "pct_start"), [(1, 1, 0.3), (1, 2, 0.5), (1, 10, 0.1), (1, 4, 0.25), (2, 2, 0.01)]
)
def test_onecycle_has_a_rate_for_every_step_of_the_shortest_runs(epochs, steps, pct_start):
    rates = ours(OneCycle(pct_start), epochs, steps)
    assert all(0 < rate <= BASE * (1 + 1e-12) for rate in rates)


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize(("patience", "min_delta", "min_lr"), [(2, 0.0, 0.0), (0, 0.0, 0.05), (1, 0.03, 0.0)])
def test_plateau_behind_the_runs_monitor_is_torchs_reduce_lr_on_plateau(mode, patience, min_delta, min_lr):
    up = [0.5, 0.52, 0.54, 0.6, 0.6, 0.59, float("nan"), 0.58, 0.6, 0.61, 0.62, 0.625, 0.66, 0.5, 0.5, 0.5, 0.5, 0.7]
    values = up if mode == "max" else [1 - v for v in up]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer, mode, factor=0.5, patience=patience, threshold=min_delta, threshold_mode="abs", min_lr=min_lr
    )
    schedule, monitor = Plateau(0.5, patience, min_lr), Monitor("val/x", mode, min_delta=min_delta)
    expected, found = [], []
    for epoch, value in enumerate(values):
        expected.append(optimizer.param_groups[0]["lr"])
        found.append(schedule.lr(BASE, Clock(epoch * STEPS, STEPS, len(values))))
        scheduler.step(value)
        monitor.update({"val/x": value}, epoch)
        schedule.end_epoch(improved=monitor.bad_epochs == 0)
    assert len(set(expected)) > 1
    assert found == pytest.approx(expected, rel=1e-12)


def test_plateau_goes_on_from_its_saved_counters():
    one, two = Plateau(0.5, 1), Plateau(0.5, 1)
    for improved in (True, False, False, False):
        one.end_epoch(improved)
    two.load_state(one.state())
    for improved in (False, True, False, False):
        one.end_epoch(improved)
        two.end_epoch(improved)
        assert ours(one) == ours(two)
    assert one.lr(BASE, Clock(0, 1, 1)) == BASE * 0.5**3


ALL = [Constant, Step, MultiStep, Exponential, Polynomial, Cosine, CosineRestarts, OneCycle, Plateau]


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("warmup_epochs", [1, 2, 0.5, 2.5])
def test_the_warm_up_rises_in_equal_stairs_that_lead_into_the_schedule(make, warmup_epochs):
    schedule = make(warmup_epochs=warmup_epochs)
    warmup = round(warmup_epochs * STEPS)
    rates = ours(schedule)
    first = make().lr(BASE, Clock(0, STEPS, EPOCHS))
    stairs = [after - before for before, after in zip([0.0, *rates], rates[: warmup + 1], strict=False)]
    assert stairs == pytest.approx([stairs[0]] * (warmup + 1), rel=1e-9)
    assert stairs[0] > 0
    assert rates[warmup] == pytest.approx(first, rel=1e-9)


@pytest.mark.parametrize("make", ALL)
def test_after_the_warm_up_the_schedule_has_the_time_that_is_left_to_itself(make):
    warm, plain = make(warmup_epochs=2), make()
    assert ours(warm)[2 * STEPS :] == pytest.approx(ours(plain, EPOCHS - 2), rel=1e-12)


@pytest.mark.parametrize("make", ALL)
def test_no_warm_up_starts_at_the_schedule_and_a_warm_up_without_end_never_exceeds_the_base(make):
    assert ours(make(warmup_epochs=0)) == ours(make())
    assert all(0 < rate <= BASE for rate in ours(make(warmup_epochs=EPOCHS)))


@pytest.mark.parametrize("make", ALL)
def test_the_rate_is_a_function_of_the_step_alone(make):
    schedule = make(warmup_epochs=1)
    forward = ours(schedule)
    backward = [schedule.lr(BASE, Clock(step, STEPS, EPOCHS)) for step in reversed(range(TOTAL))]
    assert backward[::-1] == forward


def test_every_scheduler_option_builds_the_defaults_of_its_class():
    kinds = {
        "constant": Constant,
        "cosine": Cosine,
        "cosine_restarts": CosineRestarts,
        "exponential": Exponential,
        "multistep": MultiStep,
        "onecycle": OneCycle,
        "plateau": Plateau,
        "polynomial": Polynomial,
        "step": Step,
    }
    assert [path.stem for path in OPTIONS] == list(kinds)
    for path, kind in zip(OPTIONS, kinds.values(), strict=True):
        schedule = instantiate(OmegaConf.load(path))
        assert type(schedule) is kind
        assert isinstance(schedule, Schedule)
        assert vars(schedule) == vars(kind())
        rates = ours(schedule)
        assert len(rates) == TOTAL
        assert all(0 <= rate <= BASE for rate in rates)


def test_a_plateau_starts_at_the_full_rate_in_each_phase():
    schedule = Plateau(0.1, plateau_epochs=0)
    for _ in range(3):
        schedule.end_epoch(improved=False)
    assert schedule.lr(BASE, Clock(0, STEPS, EPOCHS)) == pytest.approx(BASE * 1e-3)
    schedule.begin_phase()
    assert schedule.lr(BASE, Clock(0, STEPS, EPOCHS)) == BASE


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_more_epochs_on_resume_stretch_what_spreads_over_the_run_and_leave_the_rest_as_it_was(make, warmup_epochs):
    schedule = make(warmup_epochs=warmup_epochs)
    before, after = ours(schedule), ours(schedule, EPOCHS + 8)
    warmup = warmup_epochs * STEPS
    assert after[:warmup] == pytest.approx(before[:warmup], rel=1e-12)
    if make in (Cosine, OneCycle, Polynomial):
        assert after[TOTAL - 1] > 10 * before[TOTAL - 1]
        assert after[-1] < 0.02 * BASE
    else:
        assert after[:TOTAL] == pytest.approx(before, rel=1e-12)


@pytest.mark.parametrize("make", ALL)
def test_each_phase_of_progressive_resizing_has_the_whole_schedule_at_its_own_rate(make):
    phases = {"small": {"img_size": 16, "epochs": 7, "lr": None}, "full": {"img_size": 32, "epochs": 5, "lr": 0.1}}
    resizing, schedule = Progressive(phases, EPOCHS, 32), make(warmup_epochs=1)
    rates = []
    for step in range(TOTAL):
        phase = resizing.phase(step // STEPS)
        clock = Clock(step - phase.first * STEPS, STEPS, phase.epochs)
        rates.append(schedule.lr(BASE if phase.lr is None else phase.lr, clock))
    assert rates[: 7 * STEPS] == ours(schedule, 7)
    assert rates[7 * STEPS :] == [schedule.lr(0.1, Clock(step, STEPS, 5)) for step in range(5 * STEPS)]


def drawn(picture):
    """Where the curve's blue is, as rows by columns of the axes."""
    red, green, blue = (picture[..., i].astype(int) for i in range(3))
    return (abs(red - 0x2A) < 40) & (abs(green - 0x6F) < 40) & (abs(blue - 0xDB) < 40)


def test_the_drawn_curve_falls_from_the_base_rate_to_the_end(tmp_path):
    picture = learning_rate(ours(Cosine(warmup_epochs=2)), STEPS, tmp_path / "lr.png")
    assert (tmp_path / "lr.png").read_bytes()[:4] == b"\x89PNG"
    rows = drawn(picture[: int(0.75 * len(picture))])
    columns = np.flatnonzero(rows.any(0))
    heights = np.array([np.flatnonzero(rows[:, column]).mean() for column in columns])
    top = heights.argmin()
    share = (columns[top] - columns[0]) / (columns[-1] - columns[0])
    assert share == pytest.approx(2 / EPOCHS, abs=0.04)  # the warm-up's end
    assert (np.diff(heights[:top]) <= 1).all()
    assert (np.diff(heights[top:]) >= -1).all()


def test_phases_are_marked_where_there_are_several(tmp_path):
    rates = ours(Cosine())
    phases = Progressive({name: {"img_size": 8, "epochs": 6} for name in ("one", "two")}, EPOCHS, 8).phases
    plain = learning_rate(rates, STEPS, tmp_path / "a.png")
    one = learning_rate(rates, STEPS, tmp_path / "b.png", phases=OnePhase(EPOCHS, 8).phases)
    two = learning_rate(rates, STEPS, tmp_path / "c.png", phases=phases)
    assert np.array_equal(plain, one)
    assert plain.shape != two.shape or not np.array_equal(plain, two)


def test_the_title_of_a_plateau_says_that_its_reductions_are_not_known():
    assert "without reductions" in Plateau.caption
    assert {make.caption for make in ALL if make is not Plateau} == {"learning rate"}
