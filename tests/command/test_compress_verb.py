"""`cvtrain compress` and `cvtrain export`: artifacts added to a finished run, all proved in one table."""

import csv
import json
import shutil

import onnx
import pytest
from command_line import run_cvtrain
from real_formats import write_folder
from safetensors import safe_open

from cvtrain import runs

TINY = ("epochs=2", "limit_train_batches=8", "threads=1", "compression=none", "export=none", "logger=none", "json=true")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    answer = run_cvtrain(tmp_path_factory.mktemp("trained"), *TINY)
    assert answer.code == 0, answer.err
    return answer.folder


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of a finished run, for each test its own."""
    return shutil.copytree(trained, tmp_path / "run")


def table(folder):
    return list(csv.DictReader((folder / "artifacts.csv").open()))


def test_artifacts_are_added_and_all_of_the_folder_are_proved_together(cvtrain, finished):
    weights = (finished / "weights" / "model.safetensors").read_bytes()
    (finished / "report.html").write_text("of before")
    first = cvtrain(
        "compress", f"run={finished}", "compression=[ptq_static]", "threads=1", "json=true",
        "compression.ptq_static.calibration_samples=32",
    )  # fmt: skip
    assert first.code == 0, first.err
    assert [row["artifact"] for row in first.json["artifacts"]] == ["fp32", "int8"]
    assert "compressed/int8.onnx" in (finished / "report.html").read_text()
    assert first.json["winner"] in ("fp32", "int8")
    second = cvtrain("export", f"run={finished}", "export=[onnx]", "threads=1", "budget.max_drop=1")
    assert second.code == 0, second.err
    assert second.last == str(finished)
    assert "359 test pictures" in second.out
    lines = second.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Artifacts, each"))
    assert all(len(line.rstrip()) <= 100 for line in lines[start + 1 : start + 7]), lines
    rows = table(finished)
    assert [row["artifact"] for row in rows] == ["fp32", "int8", "onnx"]
    assert [row["exact"] for row in rows] == ["true", "false", "true"]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert [row["artifact"] for row in metrics["artifacts"]] == ["fp32", "int8", "onnx"]
    assert any(line.startswith(f"winner: {metrics['winner']}") for line in lines)
    assert metrics["metrics"]["test/acc"] == pytest.approx(float(rows[0]["accuracy"]), abs=1e-6)
    assert (finished / "compressed" / "int8_layers.csv").stat().st_size > 0
    assert (finished / "artifacts.png").stat().st_size > 0
    assert (finished / "weights" / "model.safetensors").read_bytes() == weights
    assert json.loads((finished / "status.json").read_text())["state"] == "done"
    inside = {entry.key: entry.value for entry in onnx.load(finished / "export" / "model.onnx").metadata_props}
    with safe_open(finished / "weights" / "model.safetensors", framework="np") as file:
        assert float(inside["temperature"]) == float(file.metadata()["temperature"]) > 0


def test_finetuning_uses_the_runs_own_data_and_a_missed_gate_is_code_10(cvtrain, finished):
    answer = cvtrain(
        *("compress", f"run={finished}", "compression=[prune_unstructured]", "threads=1", "json=true"),
        *("compression.prune_unstructured.finetune_epochs=1", "gate.max_size_mb=0.001"),
    )
    assert answer.code == answer.json["exit_code"] == 10
    assert "gate.max_size_mb=0.001" in answer.err
    assert "fine-tuning: epoch 1 of 1" in answer.err
    assert [row["artifact"] for row in table(finished)] == ["fp32", "pruned"]
    assert json.loads((finished / "status.json").read_text())["exit_code"] == 0


def test_a_run_is_measured_in_its_own_folder_and_its_artifacts_stay_as_they_are(cvtrain, finished):
    before = (finished / "artifacts.csv").read_bytes()
    answer = cvtrain("benchmark", f"run={finished}", "batches=[1]", "runs=5", "threads=1")
    assert answer.code == 0, answer.err
    assert answer.last == str(finished)
    assert "1 thread" in answer.out
    assert [row["artifact"] for row in csv.DictReader((finished / "benchmark.csv").open())] == ["fp32"]
    assert (finished / "artifacts.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["compress"], "run=FOLDER"),
        (["compress", "run=.", "compression=none"], "compression=[ptq_static]"),
        (["compress", "run=."], "not a run folder"),
        (["compress", "run=.", "compression=[ptq_statik]"], "'ptq_static'"),
        (["compress", "run=.", "modle=x"], "unknown group or key 'modle'"),
        (["compress", "run=.", "gate.min_accuracy=2"], "gate.min_accuracy=2"),
        (["export"], "weights=FILE"),
        (["export", "run=.", "weights=x"], "give one of"),
        (["export", "run=.", "export=none"], "export=[onnx]"),
        (["export", "run=.", "opset=20"], "unknown group or key 'opset'"),
    ],
)
def test_a_mistake_gets_an_answer_with_the_fix(cvtrain, words, text):
    answer = cvtrain(*words)
    assert answer.code == 2
    assert text in answer.err
    assert len(answer.err.strip().splitlines()) <= 3


def test_an_unfinished_run_is_refused_with_how_to_finish_it(cvtrain, finished):
    (finished / "status.json").write_text('{"state": "running", "exit_code": null}')
    answer = cvtrain("export", f"run={finished}")
    assert answer.code == 2
    assert "resume=auto" in answer.err


def test_a_run_that_is_being_written_to_is_left_alone(cvtrain, finished):
    with runs.locked(finished):
        answer = cvtrain("compress", f"run={finished}")
    assert answer.code == 9
    assert "in use" in answer.err


def test_a_file_that_has_changed_since_its_proof_is_named(cvtrain, finished):
    path = finished / "weights" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    answer = cvtrain("export", f"run={finished}", "threads=1")
    assert answer.code == 4
    assert "model.safetensors" in answer.err


def test_data_that_is_gone_or_has_changed_is_code_3(cvtrain, tmp_path):
    write_folder(tmp_path / "photos")
    done = cvtrain(*TINY, "data=folder", f"data.root={tmp_path / 'photos'}", "img_size=16", "batch_size=8")
    assert done.code == 0, done.err
    next((tmp_path / "photos").rglob("*.png")).unlink()
    changed = cvtrain("export", f"run={done.folder}", "threads=1")
    assert changed.code == 3
    assert "not what" in changed.err
    shutil.rmtree(tmp_path / "photos")
    gone = cvtrain("export", f"run={done.folder}", "threads=1")
    assert gone.code == 3
    assert "photos" in gone.err


def test_a_compressed_network_is_exported_by_its_file_into_its_run(cvtrain, finished):
    made = cvtrain(
        *("compress", f"run={finished}", "compression=[prune_structured]", "threads=1", "json=true"),
        *("compression.prune_structured.finetune_epochs=0",),
    )
    assert made.code == 0, made.err
    answer = cvtrain(
        "export", f"weights={finished}/compressed/pruned.safetensors", "export=[onnx]", "threads=1", "json=true"
    )
    assert answer.code == 0, answer.err
    rows = table(finished)
    assert [row["artifact"] for row in rows] == ["fp32", "pruned", "pruned+onnx"]
    assert rows[2]["file"] == "export/pruned.onnx"
    assert int(rows[1]["params"]) == int(rows[2]["params"]) < int(rows[0]["params"])
    assert rows[1]["accuracy"] == rows[2]["accuracy"]


def test_a_file_without_a_run_is_exported_and_proved_on_random_pictures(cvtrain, finished, tmp_path):
    shutil.copy(finished / "weights" / "model.safetensors", tmp_path / "mine.safetensors")
    answer = cvtrain("export", "weights=mine.safetensors", "export=[onnx]", "threads=1", "json=true")
    assert answer.code == 0, answer.err
    assert answer.folder.parent.name == "export_mine"
    rows = table(answer.folder)
    assert [row["artifact"] for row in rows] == ["fp32", "onnx"]
    assert [float(row["agreement"]) for row in rows] == [1.0, 1.0]
    assert (answer.folder / "export" / "model.onnx").is_file()
