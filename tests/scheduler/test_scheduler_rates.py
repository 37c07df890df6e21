"""Learning rates against torch's own schedulers, step by step."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.optim import lr_scheduler

from cvtrain.engine.monitor import Monitor
from cvtrain.scheduler import Clock, Constant, Cosine, OneCycle, Plateau, Schedule, Step

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


ALL = [Constant, Step, Cosine, OneCycle, Plateau]


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
    assert [path.stem for path in OPTIONS] == ["constant", "cosine", "onecycle", "plateau", "step"]
    for path, kind in zip(OPTIONS, (Constant, Cosine, OneCycle, Plateau, Step), strict=True):
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
