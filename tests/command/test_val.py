"""`cvtrain val` on a finished run: its metrics, its files, its artifacts and checkpoints."""

import csv
import json

import numpy as np
import pytest
import torch
from command_line import run_cvtrain
from PIL import Image
from sklearn import metrics as sk

from cvtrain.command.results import Evaluation, write_evaluation
from cvtrain.core import weights
from cvtrain.core.metrics import measured


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("val")
    made = run_cvtrain(
        *(folder, "epochs=2", "threads=1", "compression=none", "export=[onnx]", "averaging=ema"),
        *("plots=true", "json=true"),
    )
    assert made.code == 0, made.err
    return made


@pytest.fixture(scope="module")
def val(run):
    return lambda *argv: run_cvtrain(run.folder.parent, "val", f"run={run.folder}", "threads=1", *argv)


def table(path):
    return list(csv.DictReader(path.open()))


@pytest.fixture(scope="module")
def measured_again(val, run):
    answer = val("json=true")
    assert answer.code == 0, answer.err
    return answer.json, run.folder / "val" / "test_fp32"


def test_metrics_are_scikit_learns_on_the_predictions_that_it_writes(measured_again, run):
    report, folder = measured_again
    rows = table(folder / "predictions.csv")
    names = [f"{k}" for k in range(10)]
    labels, predicted = ([names.index(row[key]) for row in rows] for key in ("label", "predicted"))
    p = np.array([[float(row[f"p_{name}"]) for name in names] for row in rows])
    assert p.argmax(1).tolist() == predicted
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    assert [float(row["confidence"]) for row in rows] == pytest.approx(p.max(1).tolist())
    expected = {
        "test/acc": sk.accuracy_score(labels, predicted),
        "test/top5": sk.top_k_accuracy_score(labels, p, k=5),
        "test/balanced_acc": sk.balanced_accuracy_score(labels, predicted),
        "test/precision": sk.precision_score(labels, predicted, average="macro"),
        "test/f1": sk.f1_score(labels, predicted, average="macro"),
        "test/auroc": sk.roc_auc_score(labels, p, multi_class="ovr"),
    }
    assert {name: report["metrics"][name] for name in expected} == pytest.approx(expected, rel=1e-6)
    for name in ("test/acc", "test/loss", "test/f1"):
        assert report["metrics"][name] == pytest.approx(run.json["metrics"][name], rel=1e-5)
    assert set(report["intervals_95"]) == set(report["metrics"])
    for name, (low, high) in report["intervals_95"].items():
        assert 0 <= low < high
        assert low <= report["metrics"][name] <= high or "ece" in name


def test_the_files_agree_with_each_other_and_with_those_of_the_training(measured_again, run):
    report, folder = measured_again
    rows, first = table(folder / "predictions.csv"), table(run.folder / "predictions.csv")
    for key in ("name", "label", "predicted", "correct"):
        assert [row[key] for row in rows] == [row[key] for row in first]
    header, *matrix = csv.reader((folder / "confusion_matrix.csv").open())
    expected = sk.confusion_matrix([row["label"] for row in rows], [row["predicted"] for row in rows])
    assert header[1:] == [row[0] for row in matrix] == [str(k) for k in range(10)]
    np.testing.assert_array_equal(np.array([row[1:] for row in matrix], dtype=int), expected)
    assert (folder / "per_class.csv").read_text() == (run.folder / "per_class.csv").read_text()
    assert {path.name for path in folder.iterdir()} == {
        *("metrics.json", "per_class.csv", "predictions.csv", "confusion_matrix.csv", "confusion_matrix.png"),
        *("confusion_matrix_normalized.png", "reliability.png", "errors.png"),
    }
    for picture in folder.glob("*.png"):
        assert min(Image.open(picture).size) > 200, picture
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored["metrics"] == report["metrics"]
    assert stored["temperature"] == float(weights.read(run.folder / "weights" / "model.safetensors")[1]["temperature"])
    assert all((run.folder / name).exists() for name in ("confusion_matrix.csv", "reliability.png"))


def test_the_text_tells_intervals_calibration_and_where_the_files_are(val, run):
    answer = val("split=val")
    assert answer.folder == run.folder / "val" / "val_fp32"
    assert f"val/acc{' ' * 17}{run.json['metrics']['val/acc']:.4f}  [" in answer.out
    assert "calibration error" in answer.out
    assert "on 179 pictures" in answer.out


def test_every_artifact_and_checkpoint_is_measured_and_compared_with_the_first(val, run):
    answer = val("artifact=[fp32,onnx,best,best_ema,last]", "json=true")
    assert answer.code == 0, answer.err
    rows = {row["artifact"]: row for row in answer.json["artifacts"]}
    assert list(rows) == ["fp32", "onnx", "best", "best_ema", "last"]
    for same in ("onnx", "best_ema"):
        assert rows[same]["metrics"] == pytest.approx(rows["fp32"]["metrics"], rel=1e-3, abs=1e-5)
        assert rows[same]["temperature"] == pytest.approx(rows["fp32"]["temperature"], rel=1e-3)
    assert rows["best"]["metrics"]["test/loss"] != pytest.approx(rows["fp32"]["metrics"]["test/loss"], rel=1e-2)
    assert "Δ acc" in answer.err
    compared = {(row["artifact"], row["metric"]): row for row in table(run.folder / "val" / "test_compared.csv")}
    assert len(compared) == 5 * len(rows["fp32"]["metrics"])
    assert compared["fp32", "acc"]["difference"] == ""
    change = compared["best", "acc"]
    assert float(change["difference"]) == pytest.approx(
        rows["best"]["metrics"]["test/acc"] - rows["fp32"]["metrics"]["test/acc"]
    )
    assert float(change["difference_low"]) <= float(change["difference"]) <= float(change["difference_high"])
    assert float(compared["onnx", "acc"]["difference_low"]) < 0 < float(compared["onnx", "acc"]["difference_high"])


def test_all_are_the_rows_of_the_artifacts_table_and_a_missing_file_does_not_lose_the_others(val, run, monkeypatch):
    from cvtrain.command import worker
    from cvtrain.errors import ConfigError

    def refused(*_):
        raise ConfigError("no such runtime here")

    monkeypatch.setattr(worker, "in_process", refused)
    answer = val("artifact=all", "json=true")
    assert answer.code == 2
    assert "onnx: no such runtime here" in answer.err
    assert [row["artifact"] for row in answer.json["artifacts"]] == ["fp32"]


def test_test_time_augmentation_tells_gain_and_cost_beside_the_plain_answers(val, run):
    answer = val("tta=[rotate]", "json=true")
    plain, augmented = answer.json["artifacts"]
    assert (plain["name"], augmented["name"]) == ("fp32", "fp32 + rotate")
    assert augmented["seconds"] > 1.5 * plain["seconds"]
    assert answer.folder == run.folder
    assert json.loads((run.folder / "val" / "test_fp32_tta" / "metrics.json").read_text())["tta"] == ["rotate"]
    told = val("tta=[rotate]").out
    assert "× the time" in told
    assert "points [95 %:" in told


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["artifact=onx"], 2, ["artifact=onx", "did you mean 'onnx'", "last_ema"]),
        (["split=tset"], 2, ["split=tset", "test"]),
        (["tta=[rotat]"], 2, ["tta", "rotate"]),
        (["artifact=last_swa"], 2, ["artifact=last_swa", "last_ema"]),
    ],
)
def test_what_is_not_there_is_named_with_what_is(val, argv, code, words):
    answer = val(*argv)
    assert answer.code == code
    assert all(word in answer.err for word in words), answer.err


def test_a_damaged_checkpoint_is_refused(val, run):
    path = run.folder / "weights" / "last.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        answer = val("artifact=last")
    finally:
        path.write_bytes(content)
    assert answer.code == 4
    assert "last.safetensors is damaged" in answer.err


def test_several_labels_have_their_files_too(tmp_path):
    rng = np.random.default_rng(0)
    labels = (rng.random((40, 3)) < 0.4).astype(np.uint8)
    logits = torch.from_numpy((rng.normal(size=(40, 3)) + 2 * labels - 1).astype(np.float32))
    names = [f"{i}.png" for i in range(40)]
    asked = []

    def pictures(positions):
        asked.extend(positions.tolist())
        return torch.full((len(positions), 2, 8, 8), 90, dtype=torch.uint8)

    evaluation = Evaluation(
        measured(logits, torch.from_numpy(labels)), logits, labels, names, ["red", "green", "blue"], 1.5, pictures
    )
    figures = write_evaluation(tmp_path, evaluation)
    assert set(figures) == {"reliability"}
    rows = table(tmp_path / "predictions.csv")
    p = (logits / 1.5).sigmoid().numpy()
    np.testing.assert_array_equal(
        np.array([[row["p_red"], row["p_green"], row["p_blue"]] for row in rows], dtype=np.float32), p
    )
    wrong = ((p >= 0.5) != labels).any(1)
    assert [row["correct"] == "0" for row in rows] == wrong.tolist()
    sure = np.where((p >= 0.5) != labels, np.maximum(p, 1 - p), 0).max(1)
    assert asked == sorted(np.flatnonzero(wrong).tolist(), key=lambda i: -sure[i])[:32]
    assert (tmp_path / "errors.png").exists()
    assert set(evaluation.scores.intervals) >= {"acc", "map", "f1_micro", "auroc", "ece"}


def test_without_an_error_there_is_no_sheet_of_errors(tmp_path):
    labels = np.arange(30) % 3
    logits = 9 * torch.eye(3)[labels]
    (tmp_path / "errors.png").write_bytes(b"of an earlier model")
    metrics = measured(logits, torch.from_numpy(labels))
    names = [str(i) for i in range(30)]
    write_evaluation(tmp_path, Evaluation(metrics, logits, labels, names, ["a", "b", "c"], pictures=lambda _: None))
    assert not (tmp_path / "errors.png").exists()
    assert (tmp_path / "reliability.png").exists()


def test_logits_that_are_not_numbers_leave_files_all_the_same(tmp_path):
    labels, logits = np.arange(30) % 3, torch.full((30, 3), torch.nan)
    metrics = measured(logits, torch.from_numpy(labels))
    names = [str(i) for i in range(30)]
    write_evaluation(tmp_path, Evaluation(metrics, logits, labels, names, ["a", "b", "c"]))
    assert len(table(tmp_path / "predictions.csv")) == 30
    assert (tmp_path / "reliability.png").exists()
