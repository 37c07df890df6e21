"""`data.folds=K` on the command line: all folds, one table, every picture tested once."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = [
    *("epochs=1", "limit_train_batches=2", "limit_eval_batches=1", "device=cpu", "compression=none", "export=none"),
    *("logger=none", "model=lenet5"),
]


def test_all_folds_run_and_every_picture_is_tested_once(cvtrain):
    answer = cvtrain(*QUICK, "data.folds=3", "json=true")
    assert answer.code == 0, answer.err
    jobs = json.loads(answer.last)["jobs"]
    assert len(jobs) == 3
    splits = [json.loads((Path(job["run"]) / "splits.json").read_text()) for job in jobs]
    tested = [name for split in splits for name in split["test"]]
    assert sorted(tested, key=int) == [str(i) for i in range(1797)]
    for split in splits:
        assert not set(split["test"]) & set(split["train"] + split["val"])
        assert not set(split["train"]) & set(split["val"])
    assert "mean ± std of 3" in answer.err
    sweep = json.loads(answer.last)["run"]
    again = cvtrain(*QUICK, "data.folds=3", "json=true", f"resume={sweep}")
    assert again.code == 0, again.err
    assert [job["run"] for job in json.loads(again.last)["jobs"]] == [job["run"] for job in jobs]
    assert "job 1/3" not in again.err, "finished jobs are left alone"
    assert cvtrain(*QUICK, "data.folds=3", "resume=outputs").code == 2
    measured = cvtrain("val", f"run={jobs[1]['run']}", "json=true")  # a folder named by its overrides
    assert measured.code == 0, measured.err


def test_folds_multiply_with_a_sweep_and_are_summed_up_for_each_job(cvtrain):
    answer = cvtrain("-m", *QUICK, "data.folds=2", "optimizer.lr=0.01,0.1", "json=true")
    assert answer.code == 0, answer.err
    assert len(json.loads(answer.last)["jobs"]) == 4
    assert answer.err.count("mean ± std of 2") == 2


def test_one_fold_is_one_run(cvtrain):
    answer = cvtrain(*QUICK, "data.folds=4", "data.fold=2", "json=true")
    assert answer.code == 0, answer.err
    assert "test is fold 2 of 4" in answer.err
    assert answer.json["data"]["test"] in (449, 450)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["data.folds=1"], "data.folds=1"),
        (["data.folds=3", "data.fold=3"], "data.fold=3"),
        (["-m", "data.folds=2,3"], "one number of folds"),
        (["data.limit=0"], "data.limit=0"),
        (["sampler=even"], "balanced"),
        (["data.fold=0"], "data.folds"),
    ],
)
def test_values_out_of_range_are_config_errors(overrides, text, cvtrain):
    answer = cvtrain(*overrides)
    assert answer.code == 2
    assert text in answer.err
    assert "Traceback" not in answer.err
