"""Runs scripts/torture.py and reads what it wrote."""

import json
import subprocess
import sys
from pathlib import Path

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
