"""The winner under a budget, what the table says besides, and gates that end a run with code 10."""

import json

import pytest

from cvtrain.errors import GateError
from cvtrain.evaluation.verdict import check_gate, judge, misses, remarks

NO_BUDGET = {"max_drop": None, "latency_ms": None, "size_mb": None}
NO_GATE = {"min_accuracy": None, "max_drop": None, "max_latency_ms": None, "max_size_mb": None}


def row(artifact, accuracy, latency, megabytes, runtime="onnxruntime"):
    size = round(megabytes * 1e6)
    return {
        "artifact": artifact, "accuracy": accuracy, "latency_ms_p50": latency, "bytes": size, "runtime": runtime,
    }  # fmt: skip


ROWS = [
    row("fp32", 0.95, 10.0, 40.0, "torch"),
    row("onnx", 0.95, 5.0, 40.1),
    row("int8", 0.945, 2.0, 10.2),
    row("pruned+int8", 0.90, 1.0, 5.0),
]


@pytest.mark.parametrize(
    ("budget", "winner"),
    [
        ({}, "pruned+int8"),
        ({"max_drop": 0.01}, "int8"),
        ({"max_drop": 0.005}, "int8"),
        ({"max_drop": 0.004}, "onnx"),
        ({"max_drop": 0.004, "size_mb": 40.05}, "fp32"),
        ({"latency_ms": 1.0}, "pruned+int8"),
        ({"max_drop": 0.01, "latency_ms": 1.9}, None),
        ({"size_mb": 4.9}, None),
    ],
)
def test_the_winner_is_the_fastest_within_the_budget(budget, winner):
    assert judge(ROWS, {**NO_BUDGET, **budget}).winner == winner


def test_of_artifacts_as_fast_within_five_percent_the_smaller_file_wins():
    rows = [row("fp32", 0.9, 10.0, 4.0), row("big", 0.9, 1.0, 3.0), row("small", 0.9, 1.049, 1.0)]
    verdict = judge(rows, NO_BUDGET)
    assert verdict.winner == "small"
    assert "big" in verdict.sentence
    rows[2]["latency_ms_p50"] = 1.051
    assert judge(rows, NO_BUDGET).winner == "big"


def test_the_sentence_says_what_the_winner_gains_and_costs():
    sentence = judge(ROWS, {**NO_BUDGET, "max_drop": 0.01}).sentence
    assert "winner: int8" in sentence
    assert "max_drop=0.01" in sentence
    assert "5.0× the speed of fp32" in sentence
    assert "26 % of its size" in sentence
    assert "-0.50 points" in sentence


def test_where_none_fits_the_nearest_is_named_with_what_it_misses():
    verdict = judge(ROWS, {"max_drop": 0.01, "latency_ms": 1.9, "size_mb": None})
    assert verdict.winner is None
    assert "int8 comes closest" in verdict.sentence
    assert "budget.latency_ms=1.9: 2 ms" in verdict.sentence


def test_an_accuracy_that_is_not_a_number_fits_no_limit_on_it():
    unknown = {**ROWS[2], "accuracy": None}  # as JSON has NaN
    assert misses(unknown, ROWS[0], "budget", {"max_drop": 1.0})
    assert not misses(unknown, ROWS[0], "budget", {"latency_ms": 2.0})


def test_what_did_not_pay_is_said():
    rows = [
        row("fp32", 0.95, 10.0, 40.0, "torch"),
        row("onnx", 0.95, 9.0, 40.1),
        row("int8", 0.95, 12.0, 10.2),
        row("pruned", 0.9, 5.0, 20.0, "torch"),
        row("pruned+onnx", 0.9, 1.0, 20.0),
        row("pruned+int8", 0.9, 0.5, 5.0),
        row("pruned+qat", 0.9, 2.0, 5.0),
    ]
    said = list(remarks(rows))
    assert len(said) == 3
    assert said[0].startswith("onnx is hardly faster than fp32 in PyTorch here: 1.11×")
    assert said[1].startswith("int8 (INT8) is slower than onnx here: 0.75×")
    assert said[2].startswith("pruned+qat (INT8) is slower than pruned+onnx here: 0.50×")
    assert not list(remarks(ROWS))


def test_without_a_float_onnx_int8_is_compared_with_pytorch():
    said = list(remarks([row("fp32", 0.9, 1.0, 4.0, "torch"), row("int8", 0.9, 2.0, 1.0)]))
    assert said[0].startswith("int8 (INT8) is slower than fp32 here: 0.50×")


@pytest.mark.parametrize(
    ("gate", "text"),
    [
        ({"min_accuracy": 0.946}, "gate.min_accuracy=0.946: accuracy 0.9450"),
        ({"max_drop": 0.004}, "gate.max_drop=0.004: 0.50 points less than fp32"),
        ({"max_latency_ms": 1.5}, "gate.max_latency_ms=1.5: 2 ms"),
        ({"max_size_mb": 10}, "gate.max_size_mb=10: 10.2 MB"),
    ],
)
def test_a_winner_that_misses_the_gate_is_refused_with_what_it_misses(gate, text):
    verdict = judge(ROWS, {**NO_BUDGET, "max_drop": 0.01})
    with pytest.raises(GateError) as caught:
        check_gate(ROWS, verdict, {**NO_GATE, **gate})
    assert text in str(caught.value)
    assert "int8" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert caught.value.exit_code == 10
    check_gate(ROWS, verdict, {"min_accuracy": 0.945, "max_drop": 0.005, "max_latency_ms": 2.0, "max_size_mb": 10.2})


def test_no_winner_misses_any_gate_and_no_gate_is_missed_by_none():
    verdict = judge(ROWS, {**NO_BUDGET, "size_mb": 1.0})
    check_gate(ROWS, verdict, NO_GATE)
    with pytest.raises(GateError, match="no winner"):
        check_gate(ROWS, verdict, {**NO_GATE, "max_size_mb": 100.0})


QUICK = (
    *("epochs=1", "limit_train_batches=2", "limit_eval_batches=1", "threads=1", "compression=none", "export=none"),
    *("logger=none", "json=true"),
)


def test_a_missed_gate_ends_the_run_with_code_10_and_a_resume_judges_it_again_without_training(cvtrain):
    missed = cvtrain(*QUICK, "gate.min_accuracy=1.0")
    assert missed.code == missed.json["exit_code"] == 10, missed.err
    assert "gate.min_accuracy=1" in missed.err
    folder = missed.folder
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["retryable"]) == ("failed", 10, False)
    assert [line["artifact"] for line in missed.json["artifacts"]] == ["fp32"]
    assert "test/acc" in missed.json["metrics"]
    assert (folder / "artifacts.csv").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = cvtrain(*QUICK, "gate.min_accuracy=1.0", "resume=auto")
    assert again.code == 10
    assert again.folder == folder
    assert again.json == missed.json
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    passed = cvtrain(*QUICK, "gate.max_size_mb=100", "resume=auto")
    assert (passed.code, passed.json["status"], passed.folder) == (0, "done", folder), passed.err
    assert json.loads((folder / "status.json").read_text())["exit_code"] == 0
    finished = cvtrain(*QUICK, "resume=auto", "gate.max_latency_ms=1e-9")
    assert finished.code == 10
    assert "gate.max_latency_ms" in finished.err


@pytest.mark.slow
def test_a_job_of_a_sweep_that_misses_its_gate_is_told_and_the_others_go_on(cvtrain):
    swept = cvtrain("-m", *QUICK, "gate.max_size_mb=0.0001,100")
    assert swept.code == 1
    assert sorted(job["exit_code"] for job in swept.json["jobs"]) == [0, 10]
    again = cvtrain("-m", *QUICK, "gate.max_size_mb=0.0001,100", "resume=auto")
    assert sorted(job["exit_code"] for job in again.json["jobs"]) == [0, 10]
    assert "epoch 1" not in again.err
