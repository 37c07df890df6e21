"""What signals do besides stopping: saving, being ignored, and an end that does not wait."""

import contextlib
import os
import signal
import time

import pytest
from engine_parts import Watching, make_run

from cvtrain.engine.loop import fit
from cvtrain.engine.signals import StopRequest
from cvtrain.errors import Interrupted


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_sigusr1_saves_behind_the_step_and_training_goes_on(tmp_path):
    saves = []

    def ask(run):
        if run.state.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    with StopRequest() as stop:
        run = make_run(tmp_path, stop=stop, display=Watching(ask))
        save = run.checkpoints.save
        run.checkpoints.save = lambda *args, **kwargs: (saves.append(run.state.step), save(*args, **kwargs))
        fit(run)
    assert saves == [2, 3, 6]


def test_sigusr1_outside_training_is_kept_for_later():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.save_now
        assert not stop.requested


def test_a_sighup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("deferring", [True, False])
def test_what_does_not_end_within_the_grace_time_is_left_with_a_last_word(deferring):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with StopRequest(lambda reason, code: os.write(writer, f"{code} {reason}".encode()), grace_s=0.2) as stop:
            stop._deferring = deferring
            with contextlib.suppress(Interrupted):
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        os._exit(99)
    os.close(writer)
    started = time.monotonic()
    assert ended(child) == 143
    assert time.monotonic() - started < 10
    assert os.read(reader, 999).decode() == (
        "143 stopped by SIGTERM; it did not end within 0.2 s; the last checkpoint stands."
    )
    os.close(reader)


def test_a_second_signal_does_not_wait_for_a_last_word_that_hangs():
    child = os.fork()
    if child == 0:
        with StopRequest(lambda reason, code: time.sleep(60)) as stop, stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        os._exit(99)
    started = time.monotonic()
    assert ended(child) == 130
    assert time.monotonic() - started < 5


def test_a_run_that_ends_in_time_is_not_cut_off(tmp_path):
    child = os.fork()
    if child == 0:
        try:
            with StopRequest(grace_s=0.2) as stop, stop.deferred():
                os.kill(os.getpid(), signal.SIGTERM)
        except Interrupted:  # what came since the last save is not forgotten
            time.sleep(0.5)
            os._exit(7)
        os._exit(8)
    assert ended(child) == 7
