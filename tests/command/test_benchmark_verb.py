"""`cvtrain benchmark`: latency, throughput and memory of a run's artifacts, or of a model before any training."""

import csv
import json

import pytest


def test_a_model_is_measured_without_any_data(cvtrain):
    answer = cvtrain(
        *("benchmark", "model=simple_cnn", "num_classes=5", "in_channels=1", "img_size=8", "batches=[2,1]", "runs=5"),
        *("compression=[ptq_static]", "threads=1", "json=true"),
    )
    assert answer.code == 0, answer.err
    told = answer.json
    assert told["threads"] == 1
    assert told["cpu"]
    assert [(row["batch"], row["artifact"]) for row in told["rows"]] == [
        (batch, name) for batch in (1, 2) for name in ("fp32", "onnx", "int8")
    ]
    for row in told["rows"]:
        assert 0 < row["latency_ms_p50"] <= row["latency_ms_p95"]
        assert row["images_per_s"] == pytest.approx(1000 * row["batch"] / row["latency_ms_p50"])
        assert row["memory_mb"] > 0
    for batch in (1, 2):
        first, *others = [row for row in told["rows"] if row["batch"] == batch]
        assert first["speed"] == 1
        for row in others:
            assert row["speed"] == pytest.approx(first["latency_ms_p50"] / row["latency_ms_p50"])
    sizes = {row["artifact"]: row["bytes"] for row in told["rows"]}
    assert sizes["int8"] < 0.4 * sizes["fp32"]
    rows = list(csv.DictReader((answer.folder / "benchmark.csv").open()))
    assert [row["artifact"] for row in rows] == [row["artifact"] for row in told["rows"]]
    kept = json.loads((answer.folder / "benchmark.json").read_text())
    assert kept["rows"] == told["rows"]
    assert kept["versions"]["onnxruntime"]
    assert answer.folder.parent.name == "benchmark_simple_cnn"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["benchmark"], "run=FOLDER"),
        (["benchmark", "run=.", "model=lenet5"], "give one of"),
        (["benchmark", "model=lenet"], "'lenet5'"),
        (["benchmark", "model=lenet5", "batches=[0]"], "batches=[0]"),
        (["benchmark", "model=lenet5", "img_size=4", "num_classes=3", "in_channels=1"], "Set img_size=28"),
        (["benchmark", "run=nowhere"], "not a run folder"),
        (["benchmark", "data=digits"], "unknown group or key 'data'"),
    ],
)
def test_a_mistake_gets_an_answer_with_the_fix(cvtrain, words, text):
    answer = cvtrain(*words)
    assert answer.code == 2
    assert text in answer.err
