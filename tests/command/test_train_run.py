"""Whole runs through the command line: what they write, print and return."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from real_formats import write_folder
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cvtrain import catalog

COLUMNS = (
    "artifact,file,runtime,accuracy,delta,delta_low,delta_high,agreement,max_logit_error,ece,params,macs,bytes,"
    "gzip_bytes,latency_ms_p50,latency_ms_p95,batch,latency_batch_ms_p50,latency_batch_ms_p95,memory_mb,sha256,exact,"
    "note"
)
QUICK = ("epochs=2", "threads=1", "compression=none", "export=none", "logger=none")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The default run, shortened, in a process of its own as a shell script would start it."""
    folder = tmp_path_factory.mktemp("default")
    argv = [sys.executable, "-m", "cvtrain", "epochs=4", "threads=1", "json=true"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def report(finished):
    return json.loads(finished.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def run(report):
    return Path(report["run"])


def test_json_is_all_of_stdout_and_has_every_field(finished, report):
    assert len(finished.stdout.strip().splitlines()) == 1
    assert set(report) == {"run", "status", "exit_code", "metrics", "artifacts", "data"}
    assert (report["status"], report["exit_code"]) == ("done", 0)
    assert Path(report["run"]).is_absolute()
    assert report["data"] == {"train": 1259, "val": 179, "test": 359, "skipped": 0}
    assert {"val/acc", "val/loss", "train/loss", "test/acc", "test/f1"} <= set(report["metrics"])
    assert report["metrics"]["test/acc"] > 0.9


def test_artifacts_csv_has_the_promised_columns_and_true_numbers(run, report):
    rows = list(csv.DictReader((run / "artifacts.csv").open()))
    assert (run / "artifacts.csv").read_text().splitlines()[0] == COLUMNS
    assert [row["artifact"] for row in rows] == ["fp32", "onnx", "pruned", "pruned+int8"]
    for row, told in zip(rows, report["artifacts"], strict=True):
        assert int(row["bytes"]) == (run / row["file"]).stat().st_size == told["bytes"]
        assert float(row["delta_low"]) <= float(row["delta"]) <= float(row["delta_high"])
        assert 0 < float(row["latency_ms_p50"]) <= float(row["latency_ms_p95"])
    assert float(rows[0]["accuracy"]) == pytest.approx(report["metrics"]["test/acc"], abs=1e-6)
    assert float(rows[1]["max_logit_error"]) < 1e-4
    assert int(rows[3]["bytes"]) < 0.35 * int(rows[0]["bytes"])
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["winner"] in [row["artifact"] for row in rows]
    assert metrics["artifacts"] == report["artifacts"]


@pytest.mark.parametrize("name", ["export/model.onnx", "compressed/pruned_int8.onnx"])
def test_onnx_files_run_at_any_batch_size(run, name):
    onnx.checker.check_model(str(run / name))
    session = onnxruntime.InferenceSession(str(run / name), providers=["CPUExecutionProvider"])
    for batch in (1, 7, 64):
        images = np.random.default_rng(batch).standard_normal((batch, 1, 8, 8)).astype(np.float32)
        assert session.run(None, {session.get_inputs()[0].name: images})[0].shape == (batch, 10)


def test_the_deployed_file_carries_what_is_needed_to_use_it(run):
    with safe_open(run / "weights" / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["class_names"]) == [str(i) for i in range(10)]
    assert json.loads(metadata["preprocess"])["img_size"] == 8
    assert json.loads(metadata["model"])["_target_"] == "cvtrain.model.SimpleCNN"
    assert 0.1 < float(metadata["temperature"]) < 10
    beside = json.loads((run / "export" / "preprocess.json").read_text())
    assert beside["class_names"] == [str(i) for i in range(10)]
    inside = {entry.key: entry.value for entry in onnx.load(run / "export" / "model.onnx").metadata_props}
    assert json.loads(inside["class_names"]) == beside["class_names"]


def test_every_hash_in_the_manifest_is_true_and_nothing_is_pickled(run):
    import hashlib

    files = json.loads((run / "weights" / "manifest.json").read_text())["files"]
    names = {"last.safetensors", "last.previous.safetensors", "best.safetensors", "model.safetensors"}
    assert set(files) == names
    for name, digests in files.items():
        assert hashlib.sha256((run / "weights" / name).read_bytes()).hexdigest() in digests
    assert not [path for path in run.rglob("*") if path.suffix in {".pt", ".pth", ".pkl", ".pickle", ".ckpt"}]
    assert not list(run.rglob("*.tmp-*"))


def test_the_run_folder_explains_itself(run):
    for name in ("args.yaml", "train.log", "results.csv", "per_class.csv", "predictions.csv", ".hydra/overrides.yaml"):
        assert (run / name).stat().st_size > 0, name
    for name in ("results.png", "confusion_matrix.png", "confusion_matrix_normalized.png", "artifacts.png"):
        assert min(Image.open(run / name).size) > 200, name
    assert Image.open(run / "train_batch0.jpg").format == "JPEG"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0] or manifest["versions"]["torch"]
    assert manifest["hardware"]["threads"] == 1
    assert json.loads((run / "status.json").read_text())["state"] == "done"


def test_predictions_and_per_class_table_agree_with_the_reported_accuracy(run, report):
    predictions = list(csv.DictReader((run / "predictions.csv").open()))
    table = list(csv.DictReader((run / "per_class.csv").open()))
    assert len(predictions) == 359
    share = sum(row["correct"] == "1" for row in predictions) / 359
    assert share == pytest.approx(report["metrics"]["test/acc"])
    for row in table:
        own = [p for p in predictions if p["label"] == row["class"]]
        assert len(own) == int(row["support"])
        assert sum(p["correct"] == "1" for p in own) / len(own) == pytest.approx(float(row["recall"]))
        assert float(row["recall_low"]) <= float(row["recall"]) <= float(row["recall_high"])


def test_tensorboard_holds_scalars_pictures_and_hparams(run, report):
    events = EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "lr"} <= set(events.Tags()["scalars"])
    assert [e.value for e in events.Scalars("val/acc")][-1] == pytest.approx(
        float(list(csv.DictReader((run / "results.csv").open()))[-1]["val/acc"])
    )
    assert {"train/batch", "test/confusion_matrix"} <= set(events.Tags()["images"])
    assert events.Scalars("hparam/test/acc")[0].value == pytest.approx(report["metrics"]["test/acc"])
    assert "_hparams_/experiment" in events.summary_metadata or any("hparams" in tag for tag in events.summary_metadata)


def test_val_and_predict_use_the_run_as_it_was_shipped(cvtrain, run, report, tmp_path):
    again = cvtrain("val", f"run={run}", "json=true")
    assert again.code == 0
    assert again.json["metrics"]["test/acc"] == pytest.approx(report["metrics"]["test/acc"])
    from sklearn.datasets import load_digits

    digits = load_digits()
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        pixels = (digits.images[i] * 255 / 16).round().astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i:02d}_{digits.target[i]}.png")
    answer = cvtrain("predict", f"run={run}", "source=pictures", "topk=2")
    rows = list(csv.DictReader(answer.out.splitlines()))
    assert answer.code == 0
    assert len(rows) == 20
    assert sum(row["label"] == row["file"][-5] for row in rows) >= 17
    assert all(float(row["probability"]) >= float(row["probability_2"]) for row in rows)
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    answer = cvtrain("predict", f"weights={run}/weights/model.safetensors", "source=pictures/*.png", "json=true")
    assert answer.code == 3
    assert "broken.png" in answer.err
    assert len(json.loads(answer.last)) == 20


def test_a_weights_file_cannot_name_code(cvtrain, run, tmp_path):
    from safetensors.torch import load_file, save_file

    with safe_open(run / "weights" / "model.safetensors", framework="pt") as file:
        metadata = dict(file.metadata())
    metadata["model"] = json.dumps({"_target_": "os.system", "command": "touch hacked"})
    save_file(load_file(run / "weights" / "model.safetensors"), tmp_path / "evil.safetensors", metadata)
    answer = cvtrain("predict", "weights=evil.safetensors", "source=.")
    (tmp_path / "x.png").write_bytes(b"")
    answer = cvtrain("predict", "weights=evil.safetensors", "source=x.png")
    assert answer.code == 2
    assert "os.system is refused" in answer.err
    assert not (tmp_path / "hacked").exists()


def test_a_finished_run_is_left_alone_by_resume_auto(cvtrain):
    first = cvtrain(*QUICK, "json=true")
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()}
    second = cvtrain(*QUICK, "json=true", "resume=auto")
    assert second.code == 0
    assert "already finished" in second.err
    assert second.json == first.json
    assert before == {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()}
    third = cvtrain(*QUICK, "json=true", "resume=auto", "seed=1")
    assert third.folder != first.folder


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(cvtrain):
    folders = [cvtrain(*QUICK, f"seed={seed}").folder for seed in (0, 0, 1)]
    assert len(set(folders)) == 3
    weights = [(folder / "weights" / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]


def test_a_folder_of_pictures_trains_and_is_not_touched(cvtrain, tmp_path):
    write_folder(tmp_path / "photos")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "photos").rglob("*")}
    argv = (
        "data=folder",
        "data.root=photos",
        "img_size=32",
        "batch_size=8",
        "json=true",
        "epochs=6",
        "compression=none",
    )
    answer = cvtrain(*argv)
    assert answer.code == 0, answer.err
    assert answer.json["metrics"]["test/acc"] > 0.6
    assert sum(answer.json["data"].values()) == 36
    assert json.loads((answer.folder / "splits.json").read_text()).keys() >= {"train", "val", "test"}
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "photos").rglob("*")}
    (tmp_path / "photos" / "red" / "torn.png").write_bytes(b"\x89PNG torn")
    broken = cvtrain(*argv)
    assert broken.code == 3
    assert "torn.png" in broken.err
    assert "data.on_error=skip" in broken.err
    skipped = cvtrain(*argv, "epochs=1", "export=none", "data.on_error=skip", "data.max_bad=0.1")
    assert skipped.json["data"]["skipped"] == 1


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["data=cifar10", "data.root=/nowhere"], 3, "/nowhere"),
        (["data=folder"], 2, "data.root"),
        (["optimizer.lr=1e30"], 5, "Lower optimizer.lr"),
        (["output_dir=/proc/nowhere"], 6, "output_dir"),
        (["device=cuda:7"], 2, "device=cuda:7"),
        (["regularizer=stochastic_depth"], 2, "model=resnet18"),
        (["model=torchvision", "model.name=resnet81"], 2, "resnet18"),
        (["+optimizer.gamma=0.5"], 2, "gamma"),
    ],
)
def test_a_failure_has_its_code_its_text_and_its_status(cvtrain, argv, code, text):
    answer = cvtrain(*QUICK, *argv)
    assert answer.code == code, answer.err
    assert text in answer.err
    assert "Traceback" not in answer.err
    if answer.out:
        status = json.loads((answer.folder / "status.json").read_text())
        assert status["exit_code"] == code
        assert status["state"] == "failed"


def test_two_processes_never_share_a_run_folder(cvtrain):
    from cvtrain import runs

    folder = cvtrain(*QUICK, "optimizer.lr=1e30").folder
    with runs.locked(folder):
        answer = cvtrain(*QUICK, "optimizer.lr=1e30", f"resume={folder}")
    assert answer.code == 9
    assert "in use" in answer.err


def test_a_plug_in_model_trains_when_trusted_and_is_refused_when_not(cvtrain, tmp_path):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "plugged").mkdir()
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("_target_: plugged.Net\nwidth: 4\n")
    (tmp_path / "plugged" / "__init__.py").write_text(
        "from os import system\n"
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, num_classes, in_channels, width):\n"
        "        super().__init__(nn.Conv2d(in_channels, width, 3), nn.ReLU(), nn.Flatten(), "
        "nn.LazyLinear(num_classes))\n"
        "        self(__import__('torch').zeros(2, in_channels, 8, 8))\n"
    )
    refused = cvtrain("-cd", "conf", "model=mine", *QUICK)
    assert refused.code == 2
    assert "trusted=[plugged]" in refused.err
    answer = cvtrain("-cd", "conf", "model=mine", "trusted=[plugged]", *QUICK)
    assert answer.code == 0, answer.err
    assert cvtrain("val", f"run={answer.folder}", "trusted=[plugged]").code == 0
    assert cvtrain("val", f"run={answer.folder}").code == 2
    (tmp_path / "conf" / "model" / "lent.yaml").write_text("_target_: plugged.system\ncommand: touch hacked\n")
    lent = cvtrain("-cd", "conf", "model=lent", "trusted=[plugged]", *QUICK)
    assert lent.code == 2
    assert "not from the trusted" in lent.err
    assert not (tmp_path / "hacked").exists()


def start(folder, *argv):
    return subprocess.Popen(
        [sys.executable, "-m", "cvtrain", *argv], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_checkpoint(folder, process, epochs=1):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for manifest in folder.glob("outputs/*/*/weights/last.previous.safetensors"):
            return manifest.parents[1]
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint; {process.communicate()[1]}")


STOPPED = ("epochs=6", "threads=1", "compression=none", "export=none", "logger=none", "plots=false", "report=false",
           "aug=mixup_cutmix")  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    process = start(tmp_path_factory.mktemp("whole"), *STOPPED)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return Path(out.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, whole, number, code):
    process = start(tmp_path, *STOPPED)
    folder = wait_for_checkpoint(tmp_path, process)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == code, err
    if number != signal.SIGKILL:
        assert "resume=auto" in err
        assert out.strip().splitlines()[-1] == str(folder)
        status = json.loads((folder / "status.json").read_text())
        assert (status["state"], status["exit_code"], status["retryable"]) == ("stopped", code, True)
    resumed = start(tmp_path, *STOPPED, "resume=auto")
    out, err = resumed.communicate()
    assert resumed.returncode == 0, err
    assert out.strip().splitlines()[-1] == str(folder)
    assert "resume: goes on" in out
    for name in ("weights/model.safetensors", "results.csv", "predictions.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def test_every_verb_has_a_module_and_a_page(cvtrain):
    for verb in catalog.verbs():
        assert f"cvtrain {verb}" in cvtrain(verb, "--help").out
