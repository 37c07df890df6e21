"""`cvtrain predict`: what it reads, what it writes, what it says of files that cannot be read."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import ugly
from artifact_files import described, write_linear
from command_line import run_cvtrain
from finished_folder import COLOURS, write_nearest, write_run
from PIL import Image
from teacher_file import write_teacher

from cvtrain import errors
from cvtrain.command.predict import run as predict
from cvtrain.compose import Composer
from cvtrain.core.artifact import Artifact
from cvtrain.core.picture import printable
from cvtrain.core.types import Preprocess

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_nearest(tmp_path_factory.mktemp("model") / "model.onnx").path


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Pictures of one colour each, named after it, in folders of different depth."""
    monkeypatch.chdir(tmp_path)
    for name in ("red.png", "green.png", "more/blue.png", "more/deep/white.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 9), COLOURS[path.stem]).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("no picture by its name")
    return tmp_path / "photos"


def config(model, source, **changes):
    keys = {
        "run": None,
        "weights": model and str(model),
        "artifact": "auto",
        "source": source,
        "topk": 1,
        "batch_size": 3,
    }
    keys |= {"on_error": "fail", "output": None, "format": "auto", "threads": 1, "device": "auto", "json": False}
    return {**keys, **changes}


def table(text):
    return list(csv.DictReader(io.StringIO(text)))


def stdin(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_files_folders_patterns_standard_input_and_lists_give_the_same_rows(model, photos, capsys, monkeypatch):
    everything = ["photos/green.png", "photos/more/blue.png", "photos/more/deep/white.png", "photos/red.png"]
    listed = "".join(f"{name}\n" for name in everything).encode()
    sources = ["photos", "photos/", "photos/**/*.png", "photos/**", "-", everything, ["photos/gr*", "photos/more", "-"]]
    for source in sources:
        stdin(monkeypatch, b"\n" + (listed.replace(b"\n", b"\r\n") if source == "-" else b"photos/red.png"))
        if source == "photos/**":  # notes.txt is asked for by name
            (photos / "notes.txt").unlink()
        assert predict(config(model, source), []) == 0
        rows = table(capsys.readouterr().out)
        assert [row["file"].replace("//", "/") for row in rows] == everything, source
        assert [row["label"] for row in rows] == ["green", "blue", "white", "red"]
    assert predict(config(model, "photos/*"), []) == 0
    assert [row["file"] for row in table(capsys.readouterr().out)] == everything


def test_csv_json_and_jsonl_say_the_same_on_standard_output_and_in_files(model, photos, capsys):
    told = {}
    for kind in ("csv", "json", "jsonl"):
        assert predict(config(model, "photos", topk=2, format=kind), []) == 0
        told[kind] = capsys.readouterr().out
        assert predict(config(model, "photos", topk=2, output=f"out.{kind}"), []) == 0
        assert capsys.readouterr().out == ""
        assert (photos.parent / f"out.{kind}").read_text() == told[kind]
    assert predict(config(model, "photos", topk=2, json=True), []) == 0
    assert capsys.readouterr().out == told["json"]
    rows = json.loads(told["json"])
    assert told["json"].count("\n") == 1
    assert [json.loads(line) for line in told["jsonl"].splitlines()] == rows
    assert list(rows[0]) == ["file", "label", "probability", "label_2", "probability_2"]
    plain = table(told["csv"])
    assert [{**row, "probability": float(row["probability"]), "probability_2": float(row["probability_2"])}
            for row in plain] == rows  # fmt: skip
    assert all(0 < row["probability_2"] < row["probability"] < 1 for row in rows)
    assert sorted(path.name for path in photos.parent.iterdir()) == ["out.csv", "out.json", "out.jsonl", "photos"]


def test_a_file_of_answers_grows_beside_its_name_and_an_old_one_stands_until_it_is_whole(model, photos):
    class Watched(io.BytesIO):
        """Says what the file held when the next path was asked for."""

        def __init__(self):
            super().__init__(b"photos/red.png\n" * 9)
            self.seen = []

        def __next__(self):
            part = photos.parent / "out.csv.part"
            self.seen.append(part.read_text().count("red.png") if part.exists() else 0)
            return super().__next__()

    paths, out = Watched(), photos.parent / "out.csv"
    out.write_text("of last time")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", type("Stdin", (), {"buffer": paths})())
        assert predict(config(model, "-", output="out.csv"), []) == 0
    assert paths.seen == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9]
    assert len(table(out.read_text())) == 9
    assert not out.with_name("out.csv.part").exists()

    paths.seek(0)
    torn = iter([b"photos/red.png\n"] * 3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys, "stdin", type("Stdin", (), {"buffer": interrupted(torn)})())
        predict(config(model, "-", output="out.csv"), [])
    assert len(table(out.read_text())) == 9
    assert len(table(out.with_name("out.csv.part").read_text())) == 3


def interrupted(lines):
    yield from lines
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("messy") / "pictures"
    return folder, {printable(str(folder / file.name)): file for file in ugly.write(folder)}


@pytest.mark.parametrize(("on_error", "code"), [("fail", 3), ("skip", 0)])
def test_of_the_ugly_folder_every_readable_file_is_answered_and_every_other_named(model, messy, capsys, on_error, code):
    folder, files = messy
    before = ugly.tree_hash(folder)
    assert predict(config(model, str(folder), on_error=on_error, format="jsonl"), []) == code
    told = capsys.readouterr()
    rows = [json.loads(line) for line in told.out.splitlines()]
    kinds = {kind: {path for path, file in files.items() if file.verdict == kind} for kind in ("read", "bad")}
    assert {row["file"] for row in rows} == kinds["read"]
    assert len(rows) == len(kinds["read"])
    for row in rows:
        first = files[row["file"]].quadrants[0]
        nearest = min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], first, strict=True)))
        assert row["label"] == nearest, row
    *named, last = told.err.splitlines()
    assert len(named) == len(kinds["bad"])
    for line in named:
        path = next(path for path in kinds["bad"] if line.startswith(f"cvtrain: {path}: "))
        kinds["bad"].remove(path)
        assert files[path].reason in line
    assert last.startswith(f"cvtrain: {len(named)} of {len(named) + len(rows)} could not be read")
    assert ("on_error=skip" in last) == (on_error == "fail")
    assert ugly.tree_hash(folder) == before


def test_paths_on_standard_input_that_cannot_be_read_are_named(model, photos, capsys, monkeypatch):
    stdin(monkeypatch, b"photos/gone.png\nphotos\n\xff.png\nphotos/red.png")
    assert predict(config(model, "-"), []) == 3
    told = capsys.readouterr()
    assert [row["file"] for row in table(told.out)] == ["photos/red.png"]
    assert told.err.splitlines()[:3] == [
        "cvtrain: photos/gone.png: No such file or directory",
        "cvtrain: photos: not a regular file",
        "cvtrain: \\xff.png: No such file or directory",
    ]


def test_when_nothing_can_be_read_the_formats_are_still_whole(model, photos, capsys):
    for kind, expected in (("csv", "file,label,probability\n"), ("json", "[]\n"), ("jsonl", "")):
        assert predict(config(model, "photos/notes.txt", format=kind, on_error="skip"), []) == 0
        assert capsys.readouterr().out == expected


def test_a_source_that_stands_for_nothing_is_an_error_before_the_model_is_loaded(model, photos, capsys, monkeypatch):
    for source in ("nowhere", "photos/*.bmp", ["photos", "nowhere"]):
        for on_error in ("fail", "skip"):
            with pytest.raises(errors.DataError, match=r"source=(nowhere|photos/.*bmp): no picture there"):
                predict(config("gone.onnx", source, on_error=on_error), [])
    (photos.parent / "empty").mkdir()
    stdin(monkeypatch, b"")
    for source in ("empty", "-"):
        with pytest.raises(errors.DataError, match="no picture there"):
            predict(config(model, source, output="out.csv"), [])
    assert not list(photos.parent.glob("out.*"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": None}, "give source=PICTURE"),
        ({"weights": None}, "give one of run=FOLDER"),
        ({"run": "photos"}, "give one of run=FOLDER"),
        ({"weights": None, "run": "nowhere"}, "run=nowhere is not a folder"),
        ({"weights": None, "run": ["a", "b"]}, "one run and one artifact"),
        ({"artifact": ["onnx", "fp32"]}, "one run and one artifact"),
        ({"output": "out.txt"}, r"output=out\.txt must end in \.csv, \.json, \.jsonl"),
        ({"output": "out.csv", "json": True}, r"output=out\.csv is not json"),
        ({"output": "out.csv", "format": "jsonl"}, r"output=out\.csv is not jsonl"),
    ],
)
def test_what_contradicts_itself_is_refused(model, photos, changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        predict(config(model, **{"source": "photos", **changes}), [])


def test_an_output_that_cannot_be_written_is_a_storage_error(model, photos):
    with pytest.raises(errors.StorageError, match=r"nowhere/out\.csv"):
        predict(config(model, "photos", output="nowhere/out.csv"), [])


def test_models_of_other_channels_are_refused(tmp_path):
    path = write_teacher(tmp_path / "m.safetensors", preprocess=Preprocess(8, 8, 2, (0.5,) * 2, (0.5,) * 2))
    ugly.quadrants().save(tmp_path / "x.png")
    with pytest.raises(errors.ConfigError, match="this model takes 2 channels"):
        predict(config(path, str(tmp_path / "x.png")), [])


CHILD = """
import sys
from cvtrain.cli import main
sys.argv = ["cvtrain", "predict", *sys.argv[1:]]
try:
    main()
except SystemExit as left:
    heavy = {"torch", "torchvision", "sklearn", "scipy", "matplotlib", "onnx"} & set(sys.modules)
    sys.exit(f"imported {heavy}" if heavy else left.code)
"""


def test_an_onnx_file_answers_from_the_command_line_without_torch(model, photos):
    """What cannot be told in a process that has torch already."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, f"weights={model}", "source=photos/more", "format=jsonl"],
        capture_output=True, text=True, timeout=60, check=False, cwd=photos.parent,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == ["blue", "white"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on files of three classes, not square and larger than the models' input, and its winner in ONNX."""
    root = tmp_path_factory.mktemp("finished")
    rng = np.random.default_rng(0)
    for name in ("left", "middle", "right"):
        (root / "data" / name).mkdir(parents=True)
        for number in range(24):
            pixels = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((29, 20)).save(root / "data" / name / f"{number:02}.png")
    prepared = Preprocess(16, 18, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    described_as = described(["right", "left", "middle"], prepared, temperature="1.6")  # in an order of its own
    network = write_teacher(root / "run" / "weights" / "model.safetensors", ["left", "middle", "right"], prepared)
    weight = rng.normal(0, 0.05, (3, 3 * 16**2))
    exported = write_linear(root / "run" / "export" / "model.onnx", weight, np.zeros(3), described_as)
    rows = [(Artifact("fp32", network, "torch", 0, 0), 2.0), (exported, 1.0)]
    write_run(root / "run", rows, winner="onnx")
    overrides = ["data=folder", f"data.root={root / 'data'}", "img_size=16", "logger=none", "workers=0", "threads=1"]
    settings = Composer("train", None).check(overrides, [])[1]
    (root / "run" / "args.yaml").write_text(json.dumps(settings))  # which is YAML too
    return root / "run", root / "data"


@pytest.mark.parametrize("artifact", ["auto", "fp32"])
def test_the_probabilities_of_a_run_are_those_that_val_measures(finished, artifact, capsys):
    from cvtrain.command import answers

    folder, root = finished
    run = answers.open_run(folder, {"device": "cpu"}, [])
    measured = answers.answer(run, run.artifact("onnx" if artifact == "auto" else artifact), "test", 1)
    assert measured.temperature == (1.6 if artifact == "auto" else 1.0)
    paths = [str(root / name) for name in measured.names]
    given = config(None, paths, run=str(folder), artifact=artifact, topk=3, device="cpu", json=True)
    assert predict(given, []) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in rows] == paths
    assert len({row["probability"] for row in rows}) == len(rows) > 9
    for row, expected in zip(rows, measured.probabilities.tolist(), strict=True):
        told = {row[f"label{mark}"]: row[f"probability{mark}"] for mark in ("", "_2", "_3")}
        assert [told[name] for name in measured.class_names] == pytest.approx(expected, abs=2e-5)


def test_from_the_command_line_a_run_answers_with_its_winner(finished):
    folder, root = finished
    answer = run_cvtrain(root.parent, "predict", f"run={folder}", "source=data/left", "format=jsonl", "topk=5")
    assert (answer.code, answer.err) == (0, "")
    assert len(answer.out.splitlines()) == 24
    assert len(json.loads(answer.last)) == 7
    wrong = run_cvtrain(root.parent, "predict", f"run={folder}", "source=data", "artifact=onyx")
    assert wrong.code == 2
    assert "did you mean 'onnx'" in wrong.err
    wrong = run_cvtrain(root.parent, "predict", f"run={folder}", "source=data", "format=yaml")
    assert wrong.code == 2
    assert "auto, csv, json, jsonl" in wrong.err
