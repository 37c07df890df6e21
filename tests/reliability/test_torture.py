"""A few of the kills that scripts/torture.py does; whoever releases runs 200."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from campaign import torture, total


def test_three_kills_of_a_run_change_no_bit(tmp_path):
    rows = torture(tmp_path, "--kills", "3", "--case", "device")
    assert total(rows, "kills") == 3
    assert total(rows, "runs finished") >= 1
    assert (total(rows, "lost checkpoints"), total(rows, "differing bits"), total(rows, "wrong")) == (0, 0, 0)


@pytest.mark.slow
def test_kills_of_runs_that_change_their_number_of_workers_change_no_bit(tmp_path):
    rows = torture(tmp_path, "--kills", "4", "--seed", "1", "--case", "in turn")
    assert total(rows, "kills") == 4
    assert total(rows, "runs finished") >= 1
    assert (total(rows, "lost checkpoints"), total(rows, "differing bits"), total(rows, "wrong")) == (0, 0, 0)
