"""A few of the kills, and all of the damage, that scripts/torture.py does; whoever releases runs 200."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "torture.py"


def torture(tmp_path, *argv):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *argv, "--json", str(tmp_path / "rows.json")],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["hardware"]["cores"]
    assert content["versions"]["torch"]
    return {(row["case"], row["variant"]): row["value"] for row in content["rows"]}


def total(rows, variant):
    return sum(value for (_, name), value in rows.items() if name == variant)


def test_three_kills_of_a_run_change_no_bit(tmp_path):
    rows = torture(tmp_path, "--kills", "3", "--case", "device")
    assert total(rows, "kills") == 3
    assert total(rows, "runs finished") >= 1
    assert (total(rows, "lost checkpoints"), total(rows, "differing bits"), total(rows, "wrong")) == (0, 0, 0)


@pytest.mark.slow
def test_twenty_kills_over_all_kinds_of_runs_change_no_bit(tmp_path):
    rows = torture(tmp_path, "--kills", "20", "--seed", "1")
    assert total(rows, "kills") == 20
    assert len({case for case, _ in rows}) == 13
    assert total(rows, "inside saves") >= 5
    assert total(rows, "runs finished") >= 13
    assert (total(rows, "lost checkpoints"), total(rows, "differing bits"), total(rows, "wrong")) == (0, 0, 0)


@pytest.mark.slow
def test_every_field_of_a_checkpoint_matters_or_is_refused_and_no_damage_goes_unnoticed(tmp_path):
    rows = torture(tmp_path, "--mutate", "--flips", "400")
    assert rows["mutations", "unnoticed"] == 0
    assert rows["mutations", "differs"] >= 60
    assert rows["damage", "damaged"] == rows["damage", "noticed"] == rows["damage", "fell back"] == 424
