"""Disks that are full, failing or read-only, for real: strace makes system calls fail, small file systems fill up."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NAMES = ["best.safetensors", "last.previous.safetensors", "last.safetensors", "manifest.json"]
RUN = (
    "data=digits", "limit_train_batches=4", "save_every_steps=1", "epochs=6", "threads=1", "logger=none",
    "compression=none", "export=none", "plots=false", "report=false",
)  # fmt: skip


def can_make_a_file_system():
    made = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "x", "/mnt"], capture_output=True, check=False)
    return made.returncode == 0


needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
needs_mount = pytest.mark.skipif(not can_make_a_file_system(), reason="needs unshare -rm")


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, str(HERE / "faulting.py"), str(tmp_path_factory.mktemp("faults"))],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def only(faults, kind):
    return [point for point in faults["points"] if point["kind"] == kind]


def described(point):
    return f"{point['call']} {point['number']}: {point['code']} {point['step']} {point['left']} {point['text']}"


@needs_strace
@pytest.mark.slow
def test_a_save_is_durable_before_it_is_visible(faults):
    """Data, then the manifest that knows them, then the names, then the folder (RELIABILITY 3.2)."""
    assert faults["plain"]["code"] == 0
    calls = [
        (call.split("(")[0], [part for part in ("manifest", "previous", "best", "last.safe") if part in call][:1])
        for call in faults["plain"]["calls"]
        if not call.startswith("write")
    ]
    assert calls == [
        ("fsync", ["last.safe"]),
        ("fsync", ["manifest"]), ("rename", ["manifest"]), ("fsync", []),
        ("link", ["previous"]), ("rename", ["previous"]),
        ("link", ["best"]), ("rename", ["best"]),
        ("rename", ["last.safe"]), ("fsync", []),
    ]  # fmt: skip


@needs_strace
@pytest.mark.slow
def test_a_kill_at_any_system_call_of_a_save_leaves_the_old_checkpoint_or_the_new_one(faults):
    points = only(faults, "kill")
    assert len(points) == sum(faults["counts"].values()) >= 20
    assert [described(p) for p in points if p["code"] != -9] == []
    assert [described(p) for p in points if p["step"] not in (3, 4) or p["name"] != "last.safetensors"] == []
    assert {p["step"] for p in points} == {3, 4}
    assert [described(p) for p in points if p["names"] != NAMES] == []  # stale files are gone once a resume has begun


@needs_strace
@pytest.mark.slow
def test_an_input_output_error_at_any_system_call_ends_with_6_and_the_old_checkpoint(faults):
    points = only(faults, "eio")
    fatal = [p for p in points if p["call"] in ("write", "fsync", "rename")]
    assert len(fatal) >= 18
    assert [described(p) for p in fatal if p["code"] != 6 or "cannot write" not in p["text"]] == []
    assert [described(p) for p in points if p["call"].startswith("link") and p["code"] != 0] == []  # it copies instead
    assert [described(p) for p in points if p["left"]] == []
    last_sync = faults["counts"]["fsync"]
    for point in fatal:
        new = (point["call"], point["number"]) == ("fsync", last_sync)  # the names are there, perhaps not for long
        assert point["step"] == (4 if new else 3), described(point)


@needs_strace
@pytest.mark.slow
def test_a_failed_fsync_is_never_tried_again_on_the_same_file(faults):
    """The kernel reports lost pages once; a second fsync would succeed without them (S4)."""
    for point in only(faults, "eio"):
        if point["call"] == "fsync":
            synced = [call.split("<")[1].split(">")[0] for call in point["calls"] if call.startswith("fsync")]
            assert len(synced) == point["number"], described(point)


@needs_strace
@pytest.mark.slow
def test_a_full_disk_costs_the_checkpoint_before_the_last_and_then_the_save_succeeds(faults):
    points = only(faults, "full once")
    early = [p for p in points if p["call"] in ("write", "fsync") or (p["call"], p["number"]) == ("rename", 1)]
    assert len(early) >= 15
    assert [described(p) for p in early if (p["code"], p["step"]) != (0, 4)] == []
    assert [described(p) for p in points if p["left"] or p["code"] not in (0, 6)] == []


@needs_strace
@pytest.mark.slow
def test_a_disk_that_stays_full_ends_with_6_the_sizes_and_the_last_checkpoint(faults):
    points = [p for p in only(faults, "full") if not p["call"].startswith("link")]
    assert [described(p) for p in points if p["code"] != 6 or "are free" not in p["text"]] == []
    assert [described(p) for p in points if p["left"] or p["step"] not in (3, 4)] == []


def in_new_file_system(options, command, cwd):
    """Run a shell command that sees a small file system of its own at $DISK."""
    disk = cwd / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o {options} tmpfs "$DISK" && {command}'
    env = {**os.environ, "DISK": str(disk), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    return subprocess.run(
        ["unshare", "-rm", "bash", "-c", script],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@needs_mount
@pytest.mark.slow
def test_a_run_on_a_disk_that_fills_up_ends_with_6_and_goes_on_when_there_is_space(tmp_path):
    """Checkpoints are 0.5 MB: `last` and the one that replaces it fit, but not the best one of an earlier epoch too."""
    done = in_new_file_system(
        "size=1500k",
        f'"$PYTHON" -m cvtrain {" ".join(RUN)} output_dir="$DISK"; echo "code $?"; cat "$DISK"/*/*/status.json; '
        'ls -A "$DISK"/*/*/weights; mount -o remount,size=20m "$DISK"; '
        f'"$PYTHON" -m cvtrain {" ".join(RUN)} output_dir="$DISK" resume=auto; echo "then $?"',
        tmp_path,
    )
    assert "code 6" in done.stdout, done.stdout + done.stderr
    assert "disk full" in done.stderr
    assert "MB are free" in done.stderr
    assert '"exit_code": 6' in done.stdout
    assert '"checkpoint": "weights/last.safetensors"' in done.stdout
    assert "last.safetensors" in done.stdout
    assert "tmp-" not in done.stdout
    assert "resume: goes on" in done.stdout
    assert "then 0" in done.stdout


@needs_mount
def test_a_read_only_disk_is_found_before_data_and_model_within_two_seconds(tmp_path):
    started = time.monotonic()
    done = in_new_file_system("ro", '"$PYTHON" -m cvtrain output_dir="$DISK/runs"', tmp_path)
    assert done.returncode == 6, done.stderr
    assert "output_dir" in done.stderr
    assert "Traceback" not in done.stderr
    assert "data digits" not in done.stdout
    assert time.monotonic() - started < 20  # 1 s on a machine that has nothing else to do
