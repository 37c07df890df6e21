"""A whole multi-label run: training, tables, compression, export and proof, and what cannot be combined."""

import csv
import json

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from sklearn import metrics as sk

from cvtrain.build import Builder
from cvtrain.command import deployed
from cvtrain.command.predict import run as predict
from cvtrain.command.train import build_run, conclude
from cvtrain.compose import Composer
from cvtrain.core.types import DataSets, Preprocess
from cvtrain.core.weights import read, save_weights
from cvtrain.data import ArraySource
from cvtrain.engine.loop import evaluate_model, fit
from cvtrain.engine.signals import StopRequest
from cvtrain.errors import ConfigError
from cvtrain.report.console import make_console

NAMES = ["red", "green", "blue"]
TASK = ["task=multilabel", "loss=bce"]
QUICK = ["device=cpu", "workers=0", "logger=none", "batch_size=32"]

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(count, seed, chances=(0.5, 0.4, 0.3)):
    """A label adds light to its channel; a faint one is hard to tell."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, 3)) < chances).astype(np.uint8)
    light = rng.uniform(0, 16, (count, 1)) * labels
    pixels = rng.normal(80, 40, (count, 3, 16, 16)) + light[:, :, None, None]
    return ArraySource(
        torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), labels, [f"{seed}/{i}.png" for i in range(count)]
    )


def sets(chances=(0.5, 0.4, 0.3), train=400):
    preprocess = Preprocess(16, 16, 3, (0.4,) * 3, (0.2,) * 3)
    parts = [pictures(count, seed, chances) for seed, count in enumerate((train, 120, 200))]
    return DataSets("lights", NAMES, preprocess, *parts, multilabel=True)


def single():
    data = sets()
    parts = [
        ArraySource(s.read(np.arange(len(s))), s.labels.argmax(1), s.names) for s in (data.train, data.val, data.test)
    ]
    return DataSets("lamps", NAMES, data.preprocess, *parts)


def build(overrides, folder, data):
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    builder = Builder(Composer("train", None).check([*QUICK, *overrides], [])[1], [])
    return builder, build_run(builder, data, torch.device("cpu"), folder, StopRequest())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, data = tmp_path_factory.mktemp("lights"), sets()
    torch.set_num_threads(1)
    builder, run = build([*TASK, "epochs=6", "aug=mixup", "monitor=val/map"], folder, data)
    fit(run)
    return folder, data, run, conclude(builder, run, data, folder, make_console(json_output=True))


def rows(folder, name):
    return list(csv.DictReader((folder / name).open()))


def answers(folder, data):
    """Probabilities of the test pictures by the exported file, and their labels."""
    session = onnxruntime.InferenceSession(str(folder / "export" / "model.onnx"), providers=["CPUExecutionProvider"])
    images = data.preprocess(data.test.read(np.arange(len(data.test)))).contiguous().numpy()
    return 1 / (1 + np.exp(-session.run(None, {session.get_inputs()[0].name: images})[0])), data.test.labels


def test_the_reported_values_are_those_of_the_exported_file_by_scikit_learn(finished):
    folder, data, run, result = finished
    p, labels = answers(folder, data)
    assert result.metrics["test/acc"] == pytest.approx(sk.accuracy_score(labels, p >= 0.5), abs=0.006)
    assert result.metrics["test/map"] == pytest.approx(sk.average_precision_score(labels, p), abs=1e-3)
    assert result.metrics["test/f1_micro"] == pytest.approx(sk.f1_score(labels, p >= 0.5, average="micro"), abs=5e-3)
    assert result.metrics["test/map"] > 0.8
    assert run.monitor.best == max(row["val/map"] for row in run.state.history)


def test_every_artifact_is_proved_by_exact_match(finished):
    folder, _, _, result = finished
    proof = {row["artifact"]: row for row in result.artifacts}
    assert list(proof) == ["fp32", "onnx", "pruned", "pruned+int8"]
    assert proof["fp32"]["accuracy"] == pytest.approx(result.metrics["test/acc"])
    assert proof["onnx"]["agreement"] >= 0.999
    assert proof["pruned+int8"]["agreement"] > 0.8
    assert proof["pruned+int8"]["max_logit_error"] > 0
    assert [row["artifact"] for row in rows(folder, "artifacts.csv")] == list(proof)


def test_predictions_and_the_table_of_the_labels_agree_with_the_reported_values(finished):
    folder, data, _, result = finished
    predictions = rows(folder, "predictions.csv")
    assert [row["name"] for row in predictions] == data.test.names
    wanted, given = ([set(filter(None, row[key].split("|"))) for row in predictions] for key in ("label", "predicted"))
    assert wanted == [{NAMES[k] for k in np.flatnonzero(row)} for row in data.test.labels]
    right = [a == b for a, b in zip(wanted, given, strict=True)]
    assert [row["correct"] == "1" for row in predictions] == right
    assert np.mean(right) == pytest.approx(result.metrics["test/acc"])
    for row in predictions:
        probabilities = [float(x) for x in row["probabilities"].split("|") if x]
        assert len(probabilities) == len(list(filter(None, row["predicted"].split("|"))))
        assert all(value >= 0.5 for value in probabilities)
    for row in rows(folder, "per_class.csv"):
        name = row["class"]
        hits = sum(name in a and name in b for a, b in zip(wanted, given, strict=True))
        assert int(row["support"]) == sum(name in a for a in wanted)
        assert float(row["recall"]) == pytest.approx(hits / int(row["support"]))
        assert float(row["precision"]) == pytest.approx(hits / sum(name in b for b in given))
        assert float(row["recall_low"]) < float(row["recall"]) < float(row["recall_high"])
        assert 0.8 < float(row["average_precision"]) <= 1
    assert not list(folder.glob("confusion*"))
    assert (folder / "results.png").exists()


def test_deployed_files_say_that_every_class_is_decided_by_itself(finished):
    folder = finished[0]
    assert read(folder / "weights" / "model.safetensors")[1]["task"] == "multilabel"
    assert json.loads((folder / "export" / "preprocess.json").read_text())["task"] == "multilabel"


def config(path, **changes):
    keys = {"run": None, "source": None, "topk": 3, "batch_size": 8, "output": None, "device": "cpu", "json": False}
    keys |= {"artifact": "auto", "format": "auto", "on_error": "fail", "threads": None}
    return {**keys, "weights": str(path), **changes}


def test_predict_gives_all_labels_and_the_likeliest_with_their_own_probabilities(finished, tmp_path, capsys):
    folder, data, _, _ = finished
    for i in range(20):
        Image.fromarray(data.test.read(np.array([i]))[0].permute(1, 2, 0).numpy()).save(tmp_path / f"{i:02d}.png")
    model = folder / "weights" / "model.safetensors"
    assert predict(config(model, source=str(tmp_path)), []) == 0
    table = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert predict(config(model, source=str(tmp_path), json=True), []) == 0
    plain = json.loads(capsys.readouterr().out)
    temperature = float(read(model)[1]["temperature"])
    expected, _ = answers(folder, data)
    expected = 1 / (1 + ((1 - expected) / expected) ** (1 / temperature))
    for row, same, p in zip(table, plain, expected, strict=False):
        assert same["labels"] == [name for name, value in zip(NAMES, p, strict=True) if value >= 0.5]
        assert row["labels"] == "|".join(same["labels"])
        assert [row["label"], row["label_2"], row["label_3"]] == [NAMES[k] for k in np.argsort(-p)]
        for mark, value in zip(("", "_2", "_3"), np.sort(p)[::-1], strict=True):
            assert float(row[f"probability{mark}"]) == pytest.approx(float(value), abs=1e-4)
    assert any(len(row["labels"]) > 1 for row in plain)


def test_a_file_from_before_the_key_has_one_class_a_picture(finished, tmp_path):
    folder, _, run, _ = finished
    metadata = read(folder / "weights" / "model.safetensors")[1]
    metadata.pop("task")
    save_weights(run.model, tmp_path / "old.safetensors", metadata)
    assert not deployed.load(config(tmp_path / "old.safetensors"), []).multilabel
    assert deployed.load(config(folder / "weights" / "model.safetensors"), []).multilabel


@pytest.mark.parametrize(
    ("overrides", "data", "words"),
    [
        ([], sets, ["lights", "use task=multilabel loss=bce"]),
        (TASK, single, ["lamps", "use task=classification loss=cross_entropy"]),
        ([*TASK, "monitor=val/balanced_acc"], sets, ["monitor=val/balanced_acc", "val/map", "val/f1_micro"]),
        (["monitor=val/map"], single, ["monitor=val/map", "val/acc", "val/f1"]),
        (["monitor=val/top5"], single, ["monitor=val/top5", "3 classes", "val/acc"]),
        (["class_weights={red: 1, gren: 2, blue: 1}"], single, ["'gren'", "did you mean 'green'"]),
    ],
)
def test_what_the_data_contradicts_is_told_before_training_with_the_fix(overrides, data, words, tmp_path):
    with pytest.raises(ConfigError) as refused:
        build(overrides, tmp_path, data())
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task=multilabel"], ["task=multilabel and loss=cross_entropy", "use loss=bce"]),
        (["loss=bce"], ["task=classification and loss=bce", "use loss=cross_entropy"]),
        (["class_weights={red: 0}"], ["class_weights.red=0", "above 0"]),
        (["class_weights={red: .inf}"], ["class_weights.red", "above 0"]),
        (["class_weights=balanced", "sampler=balanced"], ["twice", "class_weights=none or sampler=shuffle"]),
        (["class_weights=balancd"], ["class_weights=balancd", "did you mean 'balanced'"]),
    ],
)
def test_what_the_config_alone_contradicts_is_told_at_once_with_the_fix(overrides, words):
    with pytest.raises(ConfigError) as refused:
        Composer("train", None).check(overrides, [])
    assert all(word in str(refused.value) for word in words), refused.value


def recall_of_blue(weights, data, folder):
    _, run = build(
        [*TASK, "epochs=3", "aug=none", f"class_weights={weights}", "compression=none"], folder / weights, data
    )
    assert (run.task.class_weights is None) == (weights == "none")
    fit(run)
    return evaluate_model(run, run.model, "test")[0].by_class()["recall"][2]


def test_class_weights_find_more_pictures_of_a_rare_label(tmp_path):
    rare = sets(chances=(0.5, 0.4, 0.05), train=600)
    plain = recall_of_blue("none", rare, tmp_path)
    for weights in ("balanced", "effective", "{red: 1, green: 2, blue: 30}"):
        assert recall_of_blue(weights, rare, tmp_path) > plain


def test_a_loss_that_takes_no_weight_is_refused_with_class_weights(tmp_path, monkeypatch):
    (tmp_path / "weightless.py").write_text(
        "class Loss:\n    def __call__(self, logits, targets):\n        return (logits - targets).square().mean()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = Composer("train", None).check([*QUICK, "class_weights=balanced"], [])[1]
    builder = Builder({**settings, "loss": {"_target_": "weightless.Loss"}}, ["weightless"])
    with pytest.raises(ConfigError, match=r"weightless\.Loss takes no weight"):
        builder.task(single(), [], torch.device("cpu"))


def test_a_table_of_labels_is_trained_measured_again_and_predicted_from_the_command_line(cvtrain, tmp_path):
    (tmp_path / "photos").mkdir()
    source = pictures(120, 7)
    lines = ["path,label\n"]
    for i, labels in enumerate(source.labels):
        Image.fromarray(source.read(np.array([i]))[0].permute(1, 2, 0).numpy()).save(tmp_path / "photos" / f"{i}.png")
        lines.append(f"photos/{i}.png,{'|'.join(NAMES[k] for k in np.flatnonzero(labels))}\n")
    (tmp_path / "labels.csv").write_text("".join(lines))
    data = ["data=csv", "data.root=labels.csv", "data.label_separator=|", "img_size=16", "aug=weak"]
    rest = [
        "epochs=2",
        "threads=1",
        "compression=none",
        "export=none",
        "class_weights=balanced",
        "monitor=val/f1_micro",
    ]
    answer = cvtrain(*TASK, *data, *rest, "json=true")
    assert answer.code == 0, answer.err
    assert "Training pictures by class" in answer.err
    assert {"test/map", "test/hamming", "val/f1_micro"} <= set(answer.json["metrics"])
    again = cvtrain("val", f"run={answer.folder}", "json=true")
    assert again.json["metrics"]["test/map"] == pytest.approx(answer.json["metrics"]["test/map"])
    low, high = again.json["intervals_95"]["test/acc"]
    assert low <= answer.json["metrics"]["test/acc"] <= high
    told = cvtrain("predict", f"run={answer.folder}", "source=photos", "json=true")
    assert {name for row in json.loads(told.last) for name in row["labels"]} <= set(NAMES)
    wrong = cvtrain(*data, *rest[:-1])
    assert wrong.code == 2
    assert "use task=multilabel loss=bce" in wrong.err
