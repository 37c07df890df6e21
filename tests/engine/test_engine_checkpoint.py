"""Checkpoints: whole, hashed, with one before them; and resume to the bit."""

import copy
import json
import logging
import math
import os
import resource
import signal
import threading

import numpy as np
import pytest
import torch
from engine_parts import Watching, adamw, make_run, network, sgd, snapshot
from torch import nn

from cvtrain.averaging import Ema
from cvtrain.core.files import sha256
from cvtrain.core.weights import to_bytes
from cvtrain.engine.checkpoint import BEST, LAST, PREVIOUS, NoCheckpoints
from cvtrain.engine.loop import evaluate, fit
from cvtrain.engine.signals import StopRequest
from cvtrain.errors import DivergedError, Interrupted, StorageError, WeightsError
from cvtrain.scheduler import Schedule


def stopping(step):
    """A display that asks the run to stop behind step number `step`, as a signal would."""

    def after(run):
        if run.state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return Watching(after)


def stopped_at(folder, step, make=make_run, **changes):
    with StopRequest() as stop:
        run = make(folder, stop=stop, display=stopping(step), **changes)
        with pytest.raises(Interrupted):
            fit(run)
    assert run.state.step == step
    return run


def resumed(folder, **changes):
    run = make_run(folder, weights_seed=9, **changes)
    assert run.checkpoints.restore(run) == LAST
    return run


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_resume_from_every_step_equals_the_uninterrupted_run_to_the_bit(tmp_path, optimizer, channels_last):
    """With mixup, plateau, warm-up, clipping, dropout, batch norm and uneven accumulation."""
    changes = {"optimizer": optimizer, "channels_last": channels_last, "epochs": 3}
    whole = make_run(tmp_path / "whole", **changes)
    fit(whole)
    expected = snapshot(whole)
    assert (whole.state.step, len(whole.state.history)) == (9, 3)
    assert whole.schedule.state()["reductions"] > 0
    best = whole.checkpoints.read(BEST)[0]
    for step in range(1, 10):
        folder = tmp_path / str(step)
        stopped_at(folder, step, **changes)
        run = resumed(folder, **changes)
        assert run.state.step == step
        fit(run)
        assert snapshot(run) == expected, step
        assert all(torch.equal(value, best[name]) for name, value in run.checkpoints.read(BEST)[0].items()), step


def test_the_comparison_above_notices_a_missing_plateau_clip_mix_or_seed(tmp_path):
    plain = make_run(tmp_path / "plain", epochs=3)
    fit(plain)
    missing = [
        {"clip_grad_norm": None},
        {"mix": False},
        {"schedule": Schedule(0.5)},
        {"grad_accum_steps": 1},
        {"seed": 6},
    ]
    for i, changes in enumerate(missing):
        other = make_run(tmp_path / str(i), epochs=3, **changes)
        fit(other)
        assert snapshot(other)["tensors"] != snapshot(plain)["tensors"], changes


def test_a_chain_of_resumes_equals_the_uninterrupted_run_and_one_after_the_end_takes_no_step(tmp_path):
    whole = make_run(tmp_path / "whole")
    fit(whole)
    stopped_at(tmp_path / "chain", 1)
    for step in (2, 4, 5):
        stopped_at(tmp_path / "chain", step, resumed)
    last = resumed(tmp_path / "chain")
    fit(last)
    assert snapshot(last) == snapshot(whole)
    before = sha256(tmp_path / "chain" / LAST)
    again = resumed(tmp_path / "chain")
    fit(again)
    assert snapshot(again) == snapshot(whole)
    assert sha256(tmp_path / "chain" / LAST) == before


def test_a_checkpoint_within_an_epoch_is_written_every_so_many_steps(tmp_path):
    seen = []

    def after(run):
        run.checkpoints.wait()
        path = tmp_path / LAST
        seen.append(run.checkpoints.read(LAST)[1]["step"] if path.exists() else 0)

    fit(make_run(tmp_path, save_every_steps=2, grad_accum_steps=1, display=Watching(after), epochs=1))
    assert seen == [0, 0, 2, 2, 4, 4]
    assert make_run(tmp_path).checkpoints.read(LAST)[1]["step"] == 6


SPOILS = {
    "history": lambda v: [{**v[0], "val/loss": math.nextafter(v[0]["val/loss"], 9)}],
    "precision.format": lambda _: "bfloat16",
    "logged": lambda v: [v[0] + 1, *v[1:]],
}
NOT_STATE = {"format", "class_names", "precision.scaler"}  # the scaler: tests/precision


def write_spoilt(store, tensors, document):
    path = store.folder / LAST
    path.unlink()
    path.write_bytes(to_bytes(tensors, {"cvtrain": json.dumps(document)}))
    store.record(LAST)


def seen(run):
    state = run.state
    other = {"seconds": state.seconds, "logged": state.logged, "parts": state.parts}
    return {**snapshot(run), **other, "precision": run.precision.state()}


def test_every_field_of_a_checkpoint_is_taken_back(tmp_path):
    stopped_at(tmp_path, 4)
    store = make_run(tmp_path).checkpoints
    tensors, document = store.read(LAST)
    tensors = {name: value.clone() for name, value in tensors.items()}
    names = [f"{key}.{inner}" for key, value in document.items() if isinstance(value, dict) for inner in value]
    names += [key for key, value in document.items() if not isinstance(value, dict)]
    names = [name for name in names if name not in NOT_STATE]
    assert {"epoch", "step", "batch", "images", "schedule.reductions", *SPOILS} < set(names)
    expected = seen(resumed(tmp_path))
    for name in names:
        spoilt = copy.deepcopy(document)
        *outer, key = name.split(".")
        node = spoilt[outer[0]] if outer else spoilt
        node[key] = SPOILS.get(name, lambda v: v + 1)(node[key])
        write_spoilt(store, tensors, spoilt)
        assert seen(resumed(tmp_path)) != expected, name
    for name, value in tensors.items():
        flat = value.clone().view(-1).numpy()
        flat[0] = np.nextafter(flat[0], np.inf, dtype=flat.dtype) if flat.dtype.kind == "f" else flat[0] + 1
        write_spoilt(store, {**tensors, name: torch.from_numpy(flat).view(value.shape)}, document)
        assert seen(resumed(tmp_path)) != expected, name
    write_spoilt(store, tensors, document)
    assert seen(resumed(tmp_path)) == expected


def test_every_single_flipped_bit_is_noticed_and_the_checkpoint_before_is_taken_with_a_warning(tmp_path, caplog):
    fit(make_run(tmp_path))
    content = (tmp_path / LAST).read_bytes()
    rng = np.random.default_rng(0)
    caplog.set_level(logging.WARNING, logger="cvtrain")
    positions = [int(p) for p in rng.integers(0, len(content) * 8, 48)] + [0, len(content) * 8 - 1]
    assert len(positions) == 50
    for position in positions:
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << (position % 8)
        (tmp_path / LAST).write_bytes(damaged)
        caplog.clear()
        run = make_run(tmp_path, weights_seed=9)
        assert run.checkpoints.restore(run) == PREVIOUS
        assert (run.state.epoch, run.state.step) == (1, 3)
        (message,) = caplog.messages
        assert f"{tmp_path / LAST} is damaged" in message
        assert "SHA-256" in message
    fit(run)
    whole = make_run(tmp_path / "whole")
    fit(whole)
    assert snapshot(run) == snapshot(whole)


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_checkpoint_cut_short_is_noticed_and_the_one_before_is_taken(tmp_path, size):
    fit(make_run(tmp_path))
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:size])
    run = make_run(tmp_path)
    assert run.checkpoints.restore(run) == PREVIOUS


def test_after_a_fall_back_the_next_save_still_leaves_a_whole_checkpoint_behind_it(tmp_path):
    fit(make_run(tmp_path))
    damage(tmp_path / LAST)
    run = make_run(tmp_path)
    assert run.checkpoints.restore(run) == PREVIOUS
    run.checkpoints.save(run, best=False)
    run.checkpoints.wait()
    damage(tmp_path / LAST)
    again = make_run(tmp_path)
    assert again.checkpoints.restore(again) == PREVIOUS


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.unlink()  # the file itself, not the links to it
    path.write_bytes(content)


def test_best_is_the_last_resort_and_nothing_usable_is_an_error_that_names_the_files(tmp_path):
    fit(make_run(tmp_path))
    damage(tmp_path / LAST)
    damage(tmp_path / PREVIOUS)
    run = make_run(tmp_path)
    assert run.checkpoints.restore(run) == BEST
    damage(tmp_path / BEST)
    with pytest.raises(
        WeightsError,
        match=r"no usable checkpoint in .*last\.safetensors, last\.previous\.safetensors, best\.safetensors",
    ):
        run.checkpoints.restore(run)


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    run = make_run(tmp_path)
    before = snapshot(run)
    assert run.checkpoints.restore(run) is None
    assert snapshot(run) == before


def test_the_manifest_holds_the_hash_of_every_file_and_previous_is_the_save_before(tmp_path):
    hashes = []
    run = make_run(tmp_path, epochs=4)
    save = run.checkpoints.save

    def remember(run, best):
        save(run, best)
        run.checkpoints.wait()
        hashes.append(sha256(tmp_path / LAST))

    run.checkpoints.save = remember
    fit(run)
    files = json.loads((tmp_path / "manifest.json").read_text())
    assert files["algorithm"] == "sha256"
    assert set(files["files"]) == {LAST, PREVIOUS, BEST}
    for name, known in files["files"].items():
        assert known[0] == sha256(tmp_path / name), name
    assert sha256(tmp_path / PREVIOUS) == hashes[-2]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([LAST, PREVIOUS, BEST, "manifest.json"])


def test_another_file_of_the_folder_can_be_entered(tmp_path):
    run = make_run(tmp_path)
    run.checkpoints.save(run, best=True)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    run.checkpoints.record("model.safetensors")
    files = json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert files["model.safetensors"] == [sha256(tmp_path / "model.safetensors")]
    assert {LAST, BEST, "model.safetensors"} <= set(files)


def test_best_holds_the_weights_of_the_best_epoch(tmp_path):
    run = make_run(tmp_path, epochs=6, base_lr=0.5)
    fit(run)
    losses = [row["val/loss"] for row in run.state.history]
    best = int(np.argmin(losses))
    assert best < 5  # it is not simply the last one
    _, document = run.checkpoints.read(BEST)
    assert (document["epoch"], run.monitor.best_epoch) == (best + 1, best)
    model = network()
    run.checkpoints.load_model(BEST, model)
    assert evaluate(run, "val", model).compute()["loss"] == pytest.approx(losses[best], abs=1e-7)


def test_temporary_files_of_a_killed_process_are_swept_and_nothing_else(tmp_path):
    fit(make_run(tmp_path))
    for name in (f".{LAST}.tmp-123", f".{BEST}.tmp-9", ".manifest.json.tmp-7"):
        (tmp_path / name).write_bytes(b"torn")
    (tmp_path / "notes.tmp-1").write_text("the user's own")
    resumed(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([LAST, PREVIOUS, BEST, "manifest.json", "notes.tmp-1"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_and_the_old_checkpoint_stands(tmp_path, bad):
    run = make_run(tmp_path)
    fit(run)
    before = {path.name: sha256(path) for path in tmp_path.iterdir()}
    with torch.no_grad():
        next(run.model.parameters()).view(-1)[3] = bad
    with pytest.raises(
        DivergedError, match=r"(?s)weights are not finite at step 6;.*the last good one stands.*optimizer\.lr"
    ):
        run.checkpoints.save(run, best=True)
    assert {path.name: sha256(path) for path in tmp_path.iterdir()} == before


def test_a_full_disk_is_a_storage_error_and_the_old_checkpoint_stands(tmp_path):
    run = make_run(tmp_path)
    fit(run)
    before = {path.name: sha256(path) for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(StorageError, match=r"(?s)disk full: .*last\.safetensors needs .*resume=auto"):
            run.checkpoints.save(run, best=True)
            run.checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: sha256(path) for path in tmp_path.iterdir()} == before
    assert resumed(tmp_path).state.step == 6


def test_a_save_that_fails_at_the_manifest_leaves_no_temporary_file(tmp_path):
    run = make_run(tmp_path)
    (tmp_path / "manifest.json" / "in the way").mkdir(parents=True)
    run.checkpoints.save(run, best=True)
    with pytest.raises(StorageError):
        run.checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_checkpoint_of_another_model_is_refused_with_the_fix(tmp_path):
    fit(make_run(tmp_path))
    other = make_run(tmp_path, model=nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))
    before = snapshot(other)
    with pytest.raises(WeightsError, match=r"the checkpoint is of another model.*model="):
        other.checkpoints.restore(other)
    assert snapshot(other) == before


def test_a_checkpoint_of_another_format_is_passed_over(tmp_path):
    run = make_run(tmp_path)
    run.checkpoints.save(run, best=False)
    tensors, document = run.checkpoints.read(LAST)
    write_spoilt(run.checkpoints, tensors, {**document, "format": 99})
    with pytest.raises(WeightsError, match="no usable checkpoint"):
        run.checkpoints.restore(run)


@pytest.mark.parametrize(
    ("name", "value"),
    [("step", None), ("history", None), ("schedule", 3), ("optimizer_scalars", None)],
)
def test_a_document_that_lacks_a_field_or_has_another_kind_is_a_weights_error(tmp_path, name, value):
    run = make_run(tmp_path)
    run.checkpoints.save(run, best=False)
    tensors, document = run.checkpoints.read(LAST)
    spoilt = {**document, name: value} if value else {k: v for k, v in document.items() if k != name}
    write_spoilt(run.checkpoints, tensors, spoilt)
    with pytest.raises(WeightsError, match=r"lacks what this version of cvtrain keeps(.|\n)*resume=none"):
        run.checkpoints.restore(run)


def test_no_checkpoints_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "w", checkpoints=NoCheckpoints())
    fit(run)
    assert run.state.step == 6
    assert list((tmp_path / "w").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def held(store):
    """Make the store's writer wait for the event that is returned."""
    commit, go = store._commit, threading.Event()

    def waiting(*args):
        assert go.wait(30)
        commit(*args)

    store._commit = waiting
    return go


def test_a_save_returns_before_it_is_written_and_holds_the_weights_of_its_own_moment(tmp_path):
    run = make_run(tmp_path)
    go = held(run.checkpoints)
    expected = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.checkpoints.save(run, best=False)
    assert not (tmp_path / LAST).exists()
    with torch.no_grad():
        for value in run.model.state_dict().values():
            value.add_(1)
    run.state.step = 99
    go.set()
    tensors, document = run.checkpoints.read(LAST)
    assert document["step"] == 0
    for name, value in expected.items():
        assert torch.equal(tensors[f"model/{name}"], value), name


def test_there_is_never_more_than_one_copy_of_the_state(tmp_path):
    run = make_run(tmp_path)
    go = held(run.checkpoints)
    run.checkpoints.save(run, best=False)
    second = threading.Thread(target=run.checkpoints.save, args=(run, False))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    go.set()
    second.join(30)
    run.checkpoints.wait()
    assert {LAST, PREVIOUS} <= {path.name for path in tmp_path.iterdir()}
    assert [thread.name for thread in threading.enumerate() if thread.name == "checkpoint"] == []


@pytest.mark.parametrize("then", ["save", "wait", "restore", "read", "record"])
def test_what_goes_wrong_in_the_writer_is_raised_once_by_the_next_who_asks(tmp_path, then):
    run = make_run(tmp_path)
    (tmp_path / "manifest.json").mkdir()
    run.checkpoints.save(run, best=False)
    calls = {
        "save": lambda: run.checkpoints.save(run, best=False), "wait": run.checkpoints.wait,
        "restore": lambda: run.checkpoints.restore(run), "read": lambda: run.checkpoints.read(LAST),
        "record": lambda: run.checkpoints.record(LAST),
    }  # fmt: skip
    with pytest.raises(StorageError, match=r"manifest\.json"):
        calls[then]()
    run.checkpoints.wait()


def test_a_save_that_fails_ends_training_even_when_it_is_the_last_one(tmp_path):
    def spoil(run, *_):
        if run.state.epoch == 2:
            (tmp_path / "manifest.json").unlink()
            (tmp_path / "manifest.json").mkdir()

    run = make_run(tmp_path, display=Watching(ended=spoil))
    with pytest.raises(StorageError):
        fit(run)
    assert run.state.epoch == 2


def test_averaged_weights_are_saved_taken_back_and_are_the_ones_to_deploy(tmp_path):
    def averaged(folder, **changes):
        run = make_run(folder, averaging=Ema(0.5), epochs=3, **changes)
        run.averaging.begin(run.model)
        return run

    whole = averaged(tmp_path / "whole")
    fit(whole)
    stopped_at(tmp_path / "parts", 4, averaged)
    rest = averaged(tmp_path / "parts", weights_seed=9)
    assert rest.checkpoints.restore(rest) == LAST
    fit(rest)
    assert snapshot(rest) == snapshot(whole)
    expected = whole.averaging.tensors()
    assert set(rest.averaging.tensors()) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in rest.averaging.tensors().items())
    model = network()
    whole.checkpoints.load_model(LAST, model)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model[0].weight, whole.model[0].weight)


def test_averaged_weights_that_are_not_finite_are_refused(tmp_path):
    run = make_run(tmp_path, averaging=Ema(0.5), epochs=1)
    run.averaging.begin(run.model)
    fit(run)
    with torch.no_grad():
        run.averaging.model()[0].bias[0] = math.nan
    with pytest.raises(DivergedError):
        run.checkpoints.save(run, best=False)
