"""The display of a run: cheap, never asking the device, and the notices that it gives."""

import io
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
from engine_parts import make_run

from cvtrain.core.types import DataSets, Preprocess
from cvtrain.data import ArraySource, Loader, LoaderConfig
from cvtrain.engine.gradients import LayerGradient
from cvtrain.engine.loop import fit
from cvtrain.engine.state import TrainState
from cvtrain.engine.timing import TimeTable
from cvtrain.report.console import Progressing, data_bound_notice, usable_cores
from cvtrain.report.diagnosis import bottleneck, gradient_table, time_table

ROW = {"train/loss": 1.5, "train/acc": 0.5, "val/loss": 1.2, "val/acc": 0.6, "lr": 0.1}


def screen(terminal=True):
    return Console(file=io.StringIO(), force_terminal=terminal, width=160, color_system=None)


def run_of(skipped=0, waited=0.0, mode="device"):
    return SimpleNamespace(
        options=SimpleNamespace(epochs=3),
        steps_per_epoch=10_000,
        state=TrainState.new(torch.device("cpu")),
        optimizer=SimpleNamespace(param_groups=[{"lr": 0.1}]),
        precision=SimpleNamespace(skipped=skipped),
        loader=SimpleNamespace(mode=mode),
    )


class Reads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in func.name() or "_to_copy" in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("terminal", [True, False])
def test_a_step_costs_the_display_microseconds(terminal):
    display, run = Progressing(screen(terminal)), run_of()
    display.begin(run)
    display.step(run)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(1000):
            display.step(run)
        times.append((time.perf_counter() - start) / 1000)
    display.end()
    assert statistics.median(times) < 5e-6, "a fiftieth of a step of 0.24 ms"


def test_the_bar_is_drawn_at_most_ten_times_a_second_and_never_by_a_thread():
    display, run = Progressing(screen()), run_of()
    display.begin(run)
    drawn = []
    display._progress.refresh = lambda: drawn.append(time.monotonic())
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        display.step(run)
    assert 1 <= len(drawn) <= 10
    assert display._progress.live._refresh_thread is None
    display.end()


def test_a_bar_that_is_slow_to_draw_is_drawn_less_often():
    display, run = Progressing(screen()), run_of()
    display.begin(run)
    drawn = []
    display._progress.refresh = lambda: drawn.append(time.sleep(0.02))
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        display.step(run)
    assert len(drawn) == 1, "20 ms are a hundredth of two seconds"
    display.end()


def test_the_display_never_reads_from_the_device():
    display, run = Progressing(screen()), run_of()
    run.state.logged = [20.0, 10.0, 4.0, 10.0, 1.0]
    display.begin(run)
    with Reads() as reads:
        display.step(run)
        display._draw_at = 0.0
        display.step(run)
    assert reads.count == 0
    assert "loss 2.000  acc 1.000" in display._progress.tasks[0].description
    display.end()


def test_a_run_on_a_terminal_shows_the_means_of_the_last_log(tmp_path):
    shown = []

    class Drawn(Progressing):
        def step(self, run):
            self._draw_at = 0.0
            super().step(run)
            shown.append(self._progress.tasks[0].description)

    run = make_run(tmp_path, display=Drawn(screen()), log_every_steps=1, epochs=1, grad_accum_steps=1)
    fit(run)
    assert len(shown) == 6
    assert "loss" not in shown[0]
    assert all("loss" in text and "acc" in text for text in shown[1:])


def test_before_the_first_log_the_bar_shows_no_loss():
    display, run = Progressing(screen()), run_of()
    display.begin(run)
    display.step(run)
    assert "loss" not in display._progress.tasks[0].description
    assert "epoch 1/3" in display._progress.tasks[0].description
    display.end()


def printed(run, rows=1, change=lambda run: None):
    console = screen(terminal=False)
    display = Progressing(console)
    display.begin(run)
    for _ in range(rows):
        change(run)
        time.sleep(0.01)
        display.step(run)
        display.end_epoch(run, ROW, improved=False)
    display.end()
    return console.file.getvalue()


def test_skipped_fp16_steps_are_shown_in_the_epoch_in_which_they_were_skipped():
    run = run_of(skipped=7)

    def overflow(run):
        run.precision.skipped += 2 if run.precision.skipped < 9 else 0

    lines = printed(run, rows=2, change=overflow).splitlines()
    assert "2 steps skipped (fp16 overflow)" in lines[1]
    assert "skipped" not in lines[2]


def test_a_run_that_waits_for_data_is_told_so_once_with_the_fix(caplog):
    def wait(run):
        run.state.waited = 0.009

    printed(run_of(mode="host"), rows=2, change=wait)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("data-bound: ")
    assert "workers=" in caplog.messages[0]


def test_a_run_that_hardly_waits_is_left_alone(caplog):
    printed(run_of(mode="host"), change=lambda run: setattr(run.state, "waited", 0.001))
    assert caplog.messages == []


def loader(mode, workers=0):
    source = ArraySource(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), np.zeros(8, dtype=np.int64), ["x"] * 8)
    sets = DataSets("x", ["a", "b"], Preprocess(2, 2, 1, (0.5,), (0.5,)), source, source, source)
    return Loader(sets, LoaderConfig(4, 0, torch.device("cpu"), mode=mode, workers=workers))


def test_the_notice_names_only_what_can_help():
    assert data_bound_notice(0.3, loader("host")) is None
    arrays = data_bound_notice(0.5, loader("host"))
    assert arrays.startswith("data-bound: 50 %")
    assert "loader=device" in arrays
    assert "cache" not in arrays
    files = data_bound_notice(0.5, SimpleNamespace(mode="host", config=SimpleNamespace(workers=usable_cores())))
    assert "data.cache=disk" in files
    assert "workers=" not in files, "all cores are busy already"
    assert "loader=device" not in files
    assert "img_size" in data_bound_notice(0.5, loader("device"))
    assert "workers" not in data_bound_notice(0.5, loader("device"))


SHARES = {"data": 0.01, "augment": 0.05, "forward": 0.3, "backward": 0.5, "optimizer": 0.05}
REST = {"other": 0.05, "evaluate": 0.03, "checkpoint": 0.01}
OPTIONS = {"device": "cpu", "precision": "float32", "compile": False, "channels_last": True, "aug": "weak"}


@pytest.mark.parametrize(
    ("changes", "options", "expected", "absent"),
    [
        ({}, {}, ("compute-bound: 85 %", "precision=amp", "compile=true"), "channels_last"),
        ({}, {"precision": "bfloat16", "compile": True}, ("compute-bound",), "precision=amp"),
        ({"data": 0.6}, {}, ("data-bound: 60 %",), "compute"),
        ({"evaluate": 0.6}, {}, ("evaluation takes 60 %", "limit_eval_batches"), "compute"),
        ({"checkpoint": 0.6}, {}, ("checkpoints take 60 %", "save_every_steps"), "compute"),
        ({"augment": 0.6}, {}, ("augmentation takes 60 %", "aug=weak"), "compute"),
        ({"other": 0.6}, {}, ("a larger batch_size",), "data-bound"),
    ],
)
def test_the_bottleneck_is_named_with_its_fix(changes, options, expected, absent):
    text = bottleneck({**SHARES, **REST, **changes}, loader("device"), {**OPTIONS, **options})
    assert all(part in text for part in expected), text
    assert absent not in text


def shown(table):
    console = screen(terminal=False)
    console.print(table)
    return console.file.getvalue()


def test_the_table_of_times_has_a_line_a_phase_and_shares_of_an_epoch():
    step = {"data": 0.001, "augment": 0.0, "forward": 0.002, "backward": 0.005, "optimizer": 0.001, "other": 0.001}
    text = shown(time_table(TimeTable(step, {"evaluate": 0.9, "checkpoint": 0.1}, 40), 100))
    assert "means of 40 steps" in text
    backward = next(line for line in text.splitlines() if "backward" in line)
    assert "5.000 ms" in backward
    assert "0.500 s" in backward
    assert "25.0 %" in backward
    assert "45.0 %" in next(line for line in text.splitlines() if "evaluation" in line)


def test_the_gradient_table_shows_layers_and_keeps_every_marked_one():
    rows = [LayerGradient(f"layer{i}.weight", "8×8", 1.0, 0.1, 0.001, 0.0) for i in range(100)]
    rows[50] = LayerGradient("[sick].weight", "8×8", 1.0, 0.1, 0.5, 0.25, "exploding")
    rows.append(LayerGradient("head.bias", "8", 0.0, 0.1, 0.001, 0.0))
    text = shown(gradient_table(4, rows))
    assert "epoch 4" in text
    assert "layer0.weight" in text
    assert "layer99.weight" in text
    assert "layer40.weight" not in text
    assert "head.bias" not in text
    sick = next(line for line in text.splitlines() if "[sick].weight" in line)
    assert "exploding" in sick
    assert "5.00e-01" in sick
    assert "25 %" in sick
    assert "101 parameters are in gradients.csv" in text
