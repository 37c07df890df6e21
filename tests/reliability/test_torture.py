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
def test_a_kill_of_every_kind_of_run_change_no_bit(tmp_path):
    rows = torture(tmp_path, "--kills", "13", "--seed", "1")
    assert total(rows, "kills") == 13
    assert len({case for case, _ in rows}) == 13
    assert total(rows, "inside saves") >= 3
    assert total(rows, "runs finished") >= 13
    assert (total(rows, "lost checkpoints"), total(rows, "differing bits"), total(rows, "wrong")) == (0, 0, 0)
