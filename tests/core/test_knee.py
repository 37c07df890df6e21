import signal
import threading
import time

import pytest

from cvtrain.core.artifact import TradeOff
from cvtrain.core.knee import knee
from cvtrain.core.time_limit import TimeLimitError, time_limit


def curve(*accuracies):
    return [TradeOff(0.1 * i, 100, 100, accuracy) for i, accuracy in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("accuracies", "found"),
    [
        ((0.95, 0.948, 0.946, 0.90, 0.6), 2),
        ((0.95, 0.94, 0.90), 1),  # one point exactly
        ((0.95, 0.96, 0.955, 0.953), 3),  # nowhere falls
        ((0.95, 0.90, 0.80), 0),  # every stage costs more
        ((0.95, 0.93, 0.945, 0.7), 2),  # a stage that comes back counts
        ((0.95,), 0),
    ],
)
def test_the_knee_is_the_last_stage_within_one_point_of_the_model_before(accuracies, found):
    assert knee(curve(*accuracies)) == found


def test_work_that_does_not_end_is_interrupted_and_the_signal_given_back():
    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    with pytest.raises(TimeLimitError), time_limit(0.05):
        while True:
            pass
    assert time.monotonic() - start < 5
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_work_that_ends_in_time_is_left_alone():
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_outside_the_main_thread_there_is_no_limit():
    ended = []

    def work():
        with time_limit(0.01):
            time.sleep(0.05)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended
