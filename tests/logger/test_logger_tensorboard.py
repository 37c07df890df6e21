"""TensorBoard files, read back with TensorBoard's own reader, and a disk that is full."""

import io
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from cvtrain.logger import JsonLines, NoLogger, TensorBoard

OPTIONS = sorted((Path(__file__).resolve().parents[2] / "configs" / "logger").glob("*.yaml"))

FULL = """
import logging, resource, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
from cvtrain.logger import TensorBoard
logger = TensorBoard(Path(sys.argv[1]))
logger.scalars({"train/loss": 1.0}, 0)
logger.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for step in range(2000):
    logger.scalars({"train/loss": 1.0, "val/acc": 0.5}, step)
    if step % 100 == 0:
        logger.flush()
logger.hparams({"lr": 0.1}, {"hparam/acc": 0.5})
logger.close()
print("training went on")
"""


def read(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()


def test_scalars_come_back_under_their_names_and_steps(tmp_path):
    logger = TensorBoard(tmp_path)
    for step in range(5):
        logger.scalars({"train/loss": 1.0 / (step + 1), "lr": 0.25}, step * 10)
    logger.close()
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == {"train/loss", "lr"}
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [0, 10, 20, 30, 40]
    assert [event.value for event in losses] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])


@pytest.mark.parametrize(
    ("channels", "side", "expected"), [(1, 8, 64), (3, 32, 64), (5, 64, 64), (2, 20, 60), (3, 80, 80)]
)
def test_pictures_come_back_as_a_grid_and_tiny_ones_are_enlarged(tmp_path, channels, side, expected):
    logger = TensorBoard(tmp_path, images=4)
    images = torch.zeros(10, channels, side, side)
    images[3] = 7.0  # beyond the range: white, not wrapped
    logger.pictures("train/batch", images, 3)
    logger.close()
    (event,) = read(tmp_path).Images("train/batch")
    assert event.step == 3
    assert (event.width, event.height) == (4 * (expected + 2) + 2, expected + 4)
    pixels = np.array(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))
    middle = expected // 2
    assert pixels[middle, 3 * (expected + 2) + middle].tolist() == [255, 255, 255]
    assert pixels[middle, middle].tolist() == [0, 0, 0]


def test_a_figure_comes_back_pixel_by_pixel(tmp_path):
    figure = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    logger = TensorBoard(tmp_path)
    logger.figure("confusion", figure, 9)
    logger.close()
    (event,) = read(tmp_path).Images("confusion")
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(event.encoded_image_string))), figure)


def test_settings_and_results_come_back_for_the_hparams_page(tmp_path):
    logger = TensorBoard(tmp_path)
    logger.hparams({"optimizer.lr": 0.1, "model": "x", "widths": [1, 2]}, {"hparam/test/acc": 0.75})
    logger.close()
    events = read(tmp_path)
    assert events.Scalars("hparam/test/acc")[0].value == 0.75
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert started["optimizer.lr"].number_value == 0.1
    assert started["model"].string_value == "x"
    assert started["widths"].string_value == "[1, 2]"
    assert "_hparams_/experiment" in events.summary_metadata


def test_what_was_flushed_is_readable_before_the_end(tmp_path):
    logger = TensorBoard(tmp_path)
    logger.scalars({"a": 1.0}, 1)
    logger.flush()
    assert [event.step for event in read(tmp_path).Scalars("a")] == [1]
    logger.close()


def test_a_resumed_run_shows_each_step_once(tmp_path):
    first = TensorBoard(tmp_path)
    for step in (1, 2, 3, 4):
        first.scalars({"a": 1.0}, step)
    first.close()
    (file,) = tmp_path.glob("events*")  # TensorBoard reads the files by their names' time, in seconds
    time = file.name.split(".")[3]
    file.rename(tmp_path / file.name.replace(time, str(int(time) - 60)))
    again = TensorBoard(tmp_path, purge_step=3)
    for step in (3, 4, 5):
        again.scalars({"a": 2.0}, step)
    again.close()
    events = read(tmp_path).Scalars("a")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_a_full_disk_turns_the_writer_off_with_one_warning_and_training_goes_on(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sorted(line for line in lines if line.startswith("WARNING")) == [
        "WARNING TensorBoard is off for the rest of this run: [Errno 27] File too large",
        "WARNING metrics.jsonl is off for the rest of this run: [Errno 27] File too large",
    ]
    assert lines[-1] == "training went on"
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written_turns_the_writer_off_with_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    caplog.set_level(logging.WARNING, logger="cvtrain")
    logger = TensorBoard(tmp_path / "file" / "run")
    logger.scalars({"a": 1.0}, 1)
    logger.pictures("p", torch.zeros(1, 3, 4, 4), 1)
    logger.figure("f", np.zeros((4, 4, 3), dtype=np.uint8), 1)
    logger.hparams({"a": 1}, {"b": 1.0})
    logger.flush()
    logger.close()
    assert [message.split(":")[0] for message in caplog.messages] == [
        "metrics.jsonl is off for the rest of this run",
        "TensorBoard is off for the rest of this run",
    ]


def test_no_logger_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = NoLogger()
    logger.scalars({"a": 1.0}, 1)
    logger.pictures("p", torch.zeros(1, 3, 4, 4), 1)
    logger.figure("f", np.zeros((4, 4, 3), dtype=np.uint8), 1)
    logger.hparams({"a": 1}, {"b": 1.0})
    logger.flush()
    logger.close()
    assert list(tmp_path.iterdir()) == []


def test_every_logger_option_builds_what_it_names(tmp_path):
    assert [path.stem for path in OPTIONS] == ["jsonl", "none", "tensorboard"]
    lines = instantiate(OmegaConf.load(OPTIONS[0]), folder=tmp_path / "lines")
    assert type(lines) is JsonLines
    assert type(instantiate(OmegaConf.load(OPTIONS[1]))) is NoLogger
    logger = instantiate(OmegaConf.load(OPTIONS[2]), folder=tmp_path)
    assert type(logger) is TensorBoard
    assert logger.images == 32
    logger.close()
