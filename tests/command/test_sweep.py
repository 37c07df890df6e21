"""Multirun: one folder a job, failures told at once, finished jobs left alone."""

import json
import signal
import subprocess
import sys
import time

import pytest


def test_a_failing_job_is_told_and_the_others_finish(cvtrain):
    quick = ("epochs=2", "threads=1", "compression=none", "export=none", "logger=none", "json=true")
    argv = ("-m", "limit_train_batches=4", "optimizer.lr=0.1,1e30", "seed=0,1", *quick)
    answer = cvtrain(*argv)
    assert answer.code == 1
    jobs = {job["name"]: job for job in answer.json["jobs"]}
    assert len(jobs) == 4
    for name, job in jobs.items():
        diverges = "1e+30" in name  # as Hydra writes it
        assert job["exit_code"] == (5 if diverges else 0)
        status = json.loads((answer.folder / name / "status.json").read_text())
        assert status["state"] == ("failed" if diverges else "done")
        assert (answer.folder / name / ".hydra" / "overrides.yaml").exists()
    failed, last = answer.err.index("failed: the loss or its gradient was not finite"), answer.err.rindex("job 4/4")
    assert failed < last
    assert "mean ± std of 2" in answer.err

    again = cvtrain(*argv, "resume=auto")
    assert again.folder == answer.folder
    done = [job for job in again.json["jobs"] if job["exit_code"] == 0]
    assert len(done) == 2
    assert all(job["seconds"] is None for job in done)
    assert {job["name"]: job["metrics"] for job in done} == {
        n: j["metrics"] for n, j in jobs.items() if not j["exit_code"]
    }


def test_job_folders_are_readable_and_of_one_level():
    from cvtrain.command.sweep import job_folder

    assert job_folder(["model=lenet5", "aug=none", "json=true", "resume=auto"]) == "model=lenet5,aug=none"
    assert "/" not in job_folder(["data.root=/a/b c"])
    assert len(job_folder([f"x{i}=y" for i in range(200)])) < 200
    assert job_folder([f"x{i}=y" for i in range(200)]) != job_folder([f"x{i}=z" for i in range(200)])


def test_no_two_jobs_share_a_folder():
    from cvtrain.command.sweep import job_folder

    assert job_folder(["data.root=imgs/a"]) != job_folder(["data.root=imgs-a"])


def test_list_values_keep_their_brackets_in_the_table(cvtrain):
    quick = ("epochs=1", "limit_train_batches=2", "limit_eval_batches=2", "threads=1", "logger=none")
    answer = cvtrain("-m", "model.widths=[8],[16]", "compression=none", "export=none", *quick)
    assert answer.code == 0, answer.err
    assert "model.widths=[8]" in answer.out
    assert "model.widths=[16]" in answer.out


@pytest.mark.slow
def test_a_stopped_sweep_says_so_and_goes_on(tmp_path):
    quick = ("epochs=6", "threads=1", "compression=none", "export=none", "logger=none", "plots=false", "report=false")
    argv = [sys.executable, "-m", "cvtrain", "-m", "seed=0,1", *quick, "json=true"]
    process = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("outputs/multirun/*/*/weights/last.safetensors")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 143, err
    assert "resume=auto" in err
    assert len(json.loads(out)["jobs"]) == 1
    done = subprocess.run([*argv, "resume=auto"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["run"] == json.loads(out)["run"]
    assert [job["exit_code"] for job in report["jobs"]] == [0, 0]
