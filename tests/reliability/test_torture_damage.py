"""A share of the damage that scripts/torture.py does; whoever releases runs `--mutate --flips 400`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from campaign import torture


@pytest.mark.slow
def test_a_changed_field_of_a_checkpoint_shows_or_is_refused(tmp_path):
    rows = torture(tmp_path, "--mutate", "0.1")
    assert rows["mutations", "unnoticed"] == 0
    assert rows["mutations", "differs"] >= 5


@pytest.mark.slow
def test_no_damage_of_a_checkpoint_goes_unnoticed(tmp_path):
    rows = torture(tmp_path, "--flips", "100")
    assert rows["damage", "damaged"] == rows["damage", "noticed"] == rows["damage", "fell back"] == 124
