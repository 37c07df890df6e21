"""The loop: accumulation, evaluation, stopping, divergence."""

import os
import signal

import numpy as np
import pytest
import torch
from engine_parts import CLASSES, Watching, make_run, network, sets, snapshot
from sklearn import metrics as sk
from torch import nn

from cvtrain.engine.loop import evaluate, evaluate_model, fit, grouped, train_step
from cvtrain.engine.monitor import Monitor
from cvtrain.engine.signals import StopRequest
from cvtrain.errors import Interrupted
from cvtrain.scheduler import Constant, OneCycle


def plain_run(folder, batch_size, accumulate, train=22, **changes):
    """No batch norm, no dropout, no mixing: what the batch size alone would change."""
    return make_run(
        folder, sets(train), network(norm=False, dropout=0.0), batch_size=batch_size, mix=False,
        grad_accum_steps=accumulate, schedule=Constant(), **changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("train", "small", "accumulate"), [(24, 4, 2), (22, 4, 2), (22, 2, 4), (22, 6, 10), (19, 4, 3)]
)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_accumulated_micro_batches_train_as_the_large_batch_does_also_when_the_last_is_short(
    tmp_path, train, small, accumulate, clip
):
    large = plain_run(tmp_path / "l", small * accumulate, 1, train, clip_grad_norm=clip)
    little = plain_run(tmp_path / "s", small, accumulate, train, clip_grad_norm=clip)
    with torch.no_grad():
        for a, b in zip(large.model.parameters(), little.model.parameters(), strict=True):
            b.copy_(a)
    start = [p.detach().clone() for p in large.model.parameters()]
    fit(large)
    fit(little)
    assert large.state.step == little.state.step
    assert large.state.images == little.state.images == 2 * (train if train % small != 1 else train - train % small)
    for before, a, b in zip(start, large.model.parameters(), little.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=0)
        assert not torch.allclose(a, before, atol=1e-3)
    for a, b in zip(large.state.history, little.state.history, strict=True):
        assert b == pytest.approx(a, abs=1e-5)


def test_a_short_last_micro_batch_counts_by_its_size(tmp_path):
    run = plain_run(
        tmp_path, 4, 2, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1), clip_grad_norm=None, base_lr=0.3
    )
    twin = plain_run(tmp_path / "t", 4, 2)
    twin.model.load_state_dict(run.model.state_dict())
    batches = list(run.loader.train_batches(0))[-2:]
    assert [len(batch) for batch in batches] == [4, 2]
    before = [p.detach().clone() for p in run.model.parameters()]
    run.model.train()
    train_step(run, batches)
    images = torch.cat([run.train_images(batch, 0) for batch in batches])
    targets = torch.cat([run.task.encode(batch.targets) for batch in batches])
    loss = run.task.losses(twin.model.train(), images, targets)["loss"]
    loss.backward()
    decay = {name: g["weight_decay"] for g in run.optimizer.param_groups for name in g["param_names"]}
    for (name, now), old, other in zip(run.model.named_parameters(), before, twin.model.parameters(), strict=True):
        assert torch.allclose(now, old - 0.3 * (other.grad + decay[name] * old), atol=1e-6), name
    assert run.state.means()["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-6)


def test_micro_batches_are_grouped_and_a_short_last_group_is_one_step():
    assert list(grouped("abcdefg", 3)) == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    assert list(grouped([], 3)) == []


def test_a_run_learns_and_its_history_is_what_the_metrics_say(tmp_path):
    run = make_run(tmp_path, sets(60), epochs=8, mix=False)
    fit(run)
    assert [set(row) for row in run.state.history] == [
        {"train/loss", "train/acc", "train/grad_norm", "lr", "val/loss", "val/acc", "val/balanced_acc", "val/f1"}
    ] * 8
    assert run.state.history[-1]["train/loss"] < 0.7 * run.state.history[0]["train/loss"]
    metrics, logits = evaluate_model(run, run.model, "val")
    labels = run.loader.sets.val.labels
    assert logits.shape == (12, CLASSES)
    assert metrics.compute()["acc"] == sk.accuracy_score(labels, logits.argmax(1)) == run.state.history[-1]["val/acc"]
    expected = sk.log_loss(labels, logits.double().softmax(1).numpy(), labels=range(CLASSES))
    assert metrics.compute()["loss"] == pytest.approx(expected, rel=1e-6)


def test_evaluation_leaves_the_mode_the_statistics_and_the_results_alone(tmp_path):
    run = make_run(tmp_path)
    run.model.train()
    before = snapshot(run)
    first, second = evaluate(run, "val").compute(), evaluate(run, "val").compute()
    assert first == second
    assert run.model.training
    assert snapshot(run) == before


def test_the_rates_of_the_schedule_are_the_ones_the_optimizer_uses(tmp_path):
    rates = []
    run = make_run(
        tmp_path, schedule=OneCycle(), display=Watching(lambda run: rates.append(run.optimizer.param_groups[0]["lr"]))
    )
    fit(run)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 6, cycle_momentum=False)
    expected = []
    for i in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if i < 5:
            scheduler.step()
    assert rates == pytest.approx(expected)
    assert [row["lr"] for row in run.state.history] == [rates[2], rates[5]]


def test_limits_cut_epochs_and_evaluation_short(tmp_path):
    run = make_run(tmp_path, limit_train_batches=3, limit_eval_batches=2)
    fit(run)
    assert (run.batches_per_epoch, run.steps_per_epoch) == (3, 2)
    assert (run.state.step, run.state.images) == (4, 2 * 3 * 4)
    assert evaluate(run, "val").matrix().sum() == 8


def test_patience_and_time_end_a_run(tmp_path):
    run = make_run(
        tmp_path / "p",
        epochs=50,
        base_lr=0.0,
        schedule=Constant(),
        model=network(norm=False),
        monitor=Monitor("val/loss", "min", patience=3),
    )
    fit(run)
    assert (run.state.epoch, run.monitor.bad_epochs) == (4, 3)
    assert run.monitor.best_epoch == 3  # equal all along: the later one
    timed = make_run(tmp_path / "t", epochs=50, max_seconds=1e-9)
    fit(timed)
    assert timed.state.epoch == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_signal_finishes_the_step_saves_and_leaves_with_its_code(tmp_path, number, code, step):
    def interrupt(run):
        if run.state.step == step:
            os.kill(os.getpid(), number)

    with StopRequest() as stop:
        run = make_run(tmp_path, stop=stop, display=Watching(interrupt))
        with pytest.raises(Interrupted) as caught:
            fit(run)
    assert caught.value.exit_code == code
    assert caught.value.retryable
    assert signal.Signals(number).name in str(caught.value)
    assert run.state.step == step
    saved = make_run(tmp_path, weights_seed=9)
    assert saved.checkpoints.restore(saved) == "last.safetensors"
    assert snapshot(saved)["tensors"] == snapshot(run)["tensors"]
    assert saved.state.step == step
    assert (saved.state.epoch, saved.state.batch) == (0, 2 * step)  # after the last step too: validation is broken off


def test_the_handlers_of_before_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with StopRequest() as stop:
        assert not stop.requested
        stop.check()
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_second_signal_leaves_at_once():
    child = os.fork()
    if child == 0:
        with StopRequest() as stop, stop.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            if stop.requested:
                os.kill(os.getpid(), signal.SIGTERM)
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


def test_outside_training_a_signal_stops_the_run_where_it_is():
    with StopRequest(), pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 143


def test_training_does_not_depend_on_numpys_or_torchs_global_generators(tmp_path):
    results = []
    for seed in (1, 2):
        run = make_run(tmp_path / str(seed))
        torch.manual_seed(seed)
        np.random.seed(seed)
        fit(run)
        results.append(snapshot(run))
    assert results[0] == results[1]


def test_a_signal_while_the_last_checkpoint_is_written_ends_the_run_and_not_the_checkpoint(tmp_path):
    class Late(Watching):
        def end(self):
            os.kill(os.getpid(), signal.SIGTERM)

    run = make_run(tmp_path, display=Late())
    with run.stop, pytest.raises(Interrupted) as caught:
        fit(run)
    assert caught.value.exit_code == 143
    again = make_run(tmp_path, weights_seed=3)
    assert again.checkpoints.restore(again) == "last.safetensors"
    assert snapshot(again)["tensors"] == snapshot(run)["tensors"]
