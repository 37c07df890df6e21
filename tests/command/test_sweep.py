"""Multirun: one folder a job, failures told at once, finished jobs left alone."""

import json


def test_a_failing_job_is_told_and_the_others_finish(cvtrain):
    quick = ("epochs=2", "threads=1", "compression=none", "export=none", "logger=none", "json=true")
    argv = ("-m", "optimizer.lr=0.1,1e30", "seed=0,1", *quick)
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
    failed, last = answer.err.index("failed: the loss became"), answer.err.rindex("job 4/4")
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
