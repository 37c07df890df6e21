"""metrics.jsonl: torn tails, damaged lines, a resume, and disks that refuse; each really happens."""

import json
import logging
import math
import os
import signal
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cvtrain.logger import JsonLines, TensorBoard, read_metrics

CHILD = """
import logging, os, resource, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
from cvtrain.logger import JsonLines
"""

FULL = (
    CHILD
    + """
logger = JsonLines(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for step in range(500):
    logger.scalars({"train/loss": 1.0}, step)
logger.flush()
logger.close()
print("training went on")
"""
)

FOREIGN = (
    CHILD
    + """
os.setgid(65534)
os.setuid(65534)
logger = JsonLines(Path(sys.argv[1]))
logger.scalars({"train/loss": 1.0}, 1)
logger.flush()
logger.close()
print("training went on")
"""
)

KILLED = (
    CHILD
    + """
logger = JsonLines(Path(sys.argv[1]))
step = 0
while True:
    step += 1
    logger.scalars({"train/loss": 1.0 / step, "lr": 0.1}, step)
    if step == 200:
        print("ready", flush=True)
"""
)


def child(code, folder):
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False, timeout=120
    )


def written(folder, steps, purge_step=None, kind=JsonLines, value=1.0):
    logger = kind(folder, purge_step)
    for step in steps:
        logger.scalars({"a": value}, step)
    logger.close()


def read(folder):
    return read_metrics(folder / "metrics.jsonl")


def test_a_line_a_write_with_its_step_and_names(tmp_path):
    logger = JsonLines(tmp_path)
    logger.scalars({"train/loss": 0.1 + 0.2, "lr": 0.25}, 50)
    logger.scalars({"val/acc": 0.5}, 50)
    logger.scalars({"train/loss": math.nan}, 100)
    text = (tmp_path / "metrics.jsonl").read_text()  # not closed, not flushed: it is there already
    assert [json.loads(line) for line in text.splitlines()] == [
        {"step": 50, "train/loss": 0.1 + 0.2, "lr": 0.25},
        {"step": 50, "val/acc": 0.5},
        {"step": 100, "train/loss": None},
    ]
    assert read(tmp_path)[0] == {"step": 50, "train/loss": 0.1 + 0.2, "lr": 0.25, "val/acc": 0.5}
    logger.close()


def test_tensorboard_writes_both_files_with_the_same_scalars(tmp_path):
    logger = TensorBoard(tmp_path)
    logger.scalars({"train/loss": 0.5}, 3)
    logger.hparams({"lr": 0.1}, {"hparam/acc": 0.75})
    logger.close()
    assert read(tmp_path) == [{"step": 3, "train/loss": 0.5}]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 0.5)]


@pytest.mark.parametrize("kind", [JsonLines, TensorBoard])
def test_a_resumed_run_has_each_step_once(tmp_path, kind):
    written(tmp_path, (1, 2, 3, 4), kind=kind)
    written(tmp_path, (3, 4, 5), purge_step=3, kind=kind, value=2.0)
    assert [(line["step"], line["a"]) for line in read(tmp_path)] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5, "not only read so, but written so"


def test_a_new_run_in_the_folder_begins_with_an_empty_file(tmp_path):
    written(tmp_path, (1, 2))
    written(tmp_path, (1,), value=3.0)
    assert read(tmp_path) == [{"step": 1, "a": 3.0}]


@pytest.mark.parametrize("tail", [b'{"step": 3, "a"', b'{"step": 3, "a": 1.0}', b"\x00\x00\x00\x00"])
def test_a_torn_tail_is_left_out_by_readers_and_taken_away_by_a_resume(tmp_path, tail):
    written(tmp_path, (1, 2))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    assert [line["step"] for line in read(tmp_path)][:2] == [1, 2]
    written(tmp_path, (3, 4), purge_step=3)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4]
    for line in path.read_text().splitlines():
        json.loads(line)


def test_a_flipped_byte_costs_one_line_at_most(tmp_path):
    written(tmp_path, range(1, 51))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :])
        assert len(read(tmp_path)) >= 48, at


def test_what_a_killed_process_has_written_is_there(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    steps = [line["step"] for line in read(tmp_path)]
    assert len(steps) >= 200
    assert steps == list(range(1, len(steps) + 1))


def test_a_full_disk_turns_the_lines_off_with_one_warning_and_training_goes_on(tmp_path):
    done = child(FULL, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "WARNING metrics.jsonl is off for the rest of this run: [Errno 27] File too large",
        "training went on",
    ]
    assert "Traceback" not in done.stderr
    steps = [line["step"] for line in read(tmp_path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > 40


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody who may not write")
def test_a_folder_that_may_not_be_written_turns_the_lines_off_with_one_warning(tmp_path):
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    done = child(FOREIGN, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("WARNING metrics.jsonl is off for the rest of this run: [Errno 13] Permission denied")
    assert list(tmp_path.iterdir()) == []


def test_one_writer_that_fails_leaves_the_other_on(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").mkdir()  # a folder cannot be opened as a file
    caplog.set_level(logging.WARNING, logger="cvtrain")
    logger = TensorBoard(tmp_path)
    logger.scalars({"a": 0.5}, 1)
    logger.close()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("metrics.jsonl is off")
    assert [event.value for event in EventAccumulator(str(tmp_path)).Reload().Scalars("a")] == [0.5]
