"""A real training whose logs meet a full disk: it goes on, and its checkpoints stand."""

import subprocess
import sys
from pathlib import Path

import pytest

from cvtrain.logger import read_metrics

RUN = """
import logging, resource, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from engine_parts import make_run
from cvtrain.engine.loop import fit
from cvtrain.logger import TensorBoard
folder = Path(sys.argv[1])
run = make_run(folder / "weights", epochs=4, log_every_steps=1)
run.tracker = TensorBoard(folder)
run.tracker.pictures("large", torch.rand(32, 3, 96, 96), 0)
run.tracker.flush()
largest = max(file.stat().st_size for file in folder.glob("events*"))
with (folder / "metrics.jsonl").open("ab") as file:
    file.write(b'{"step": 0, "a": "' + b"x" * (largest - 400) + b'"}\\n')
resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 100, largest + 100))
fit(run)
run.tracker.close()
print("epochs", run.state.epoch, "checkpoint", (folder / "weights" / "last.safetensors").stat().st_size > 0)
"""


@pytest.mark.slow
def test_a_disk_that_is_full_for_the_logs_leaves_the_training_alone(tmp_path):
    engine = Path(__file__).parents[1] / "engine"
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), str(engine)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "epochs 4 checkpoint True"
    warnings = [line for line in lines if line.startswith("WARNING")]
    assert sorted(line.split(" is off")[0] for line in warnings) == ["WARNING TensorBoard", "WARNING metrics.jsonl"]
    assert "Traceback" not in done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")][:2] == [0, 1], "what fitted is there"
