"""`cvtrain inspect run=FOLDER`: looking into the model of a finished run."""

import csv
import shutil

import numpy as np
import pytest
import torch
from command_line import run_cvtrain
from PIL import Image

from cvtrain.command.looking import _first_label
from cvtrain.command.picked import _asked

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("looked")
    answer = run_cvtrain(
        place,
        "epochs=4",
        "data.limit=800",
        "compression=none",
        "export=none",
        "logger=none",
        "device=cpu",
        "json=true",
        "seed=1",
    )
    assert answer.code == 0, answer.err
    return answer.folder


def look(folder, what, *more):
    answer = run_cvtrain(folder.parent, "inspect", f"run={folder}", f"what={what}", "device=cpu", "json=true", *more)
    assert answer.code == 0, answer.err
    assert answer.json["run"] == str(folder / "inspect" / what)
    for file in answer.json["files"]:
        assert (answer.folder / file).stat().st_size > 0
        if file.endswith(".png"):
            with Image.open(answer.folder / file) as picture:
                assert np.asarray(picture.convert("L")).std() > 5, "not one colour"
    return answer


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_grad_cam_shows_the_worst_errors_unless_told_otherwise(trained):
    answer = look(trained, "gradcam")
    assert answer.json["files"] == ["gradcam.png"]
    with Image.open(answer.folder / "gradcam.png") as picture:
        colours = np.asarray(picture.convert("RGB")).astype(int)
    assert (np.ptp(colours, axis=2) > 80).mean() > 0.01, "maps in colour"
    look(trained, "gradcam", "layer=features.0", "split=val")


def test_grad_cam_and_features_take_ones_own_pictures(trained, tmp_path):
    for name, grey in (("dark.png", 20), ("light.png", 220)):
        array = np.full((20, 30), grey, np.uint8)
        array[5:15, 10:20] = 255 - grey
        Image.fromarray(array).save(tmp_path / name)
    look(trained, "gradcam", f"source={tmp_path}")
    answer = look(trained, "features", f"source={tmp_path}", "layers=[features.0,features.4]")
    assert answer.json["files"] == ["features_1.png", "features_2.png"]


def test_features_are_shown_for_a_few_layers(trained):
    assert look(trained, "features").json["files"] == [f"features_{i}.png" for i in (1, 2, 3)]


def test_errors_are_those_of_the_predictions(trained):
    answer = look(trained, "errors")
    wrong = [row for row in rows(trained / "predictions.csv") if row["correct"] == "0"]
    pairs = rows(answer.folder / "confused_pairs.csv")
    assert sum(int(row["count"]) for row in pairs) == len(wrong) > 0
    counts = {(row["true"], row["predicted"]): int(row["count"]) for row in pairs}
    for row in wrong:
        counts[row["label"], row["predicted"]] -= 1
    assert not any(counts.values())
    assert [int(row["count"]) for row in pairs] == sorted((int(row["count"]) for row in pairs), reverse=True)


def test_tsne_tells_digits_apart_by_what_the_last_layer_gets(trained):
    answer = look(trained, "tsne")
    table = rows(answer.folder / "tsne.csv")
    told = {row["name"]: row["predicted"] for row in rows(trained / "predictions.csv")}
    assert {row["name"]: row["predicted"] for row in table} == told
    places = np.array([[float(row["x"]), float(row["y"])] for row in table])
    labels = np.array([row["label"] for row in table])
    distances = ((places[:, None] - places[None]) ** 2).sum(2)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(1)] == labels).mean() > 0.8


def test_filters_and_weights_need_no_data(trained, tmp_path):
    look(trained, "filters")
    answer = look(trained, "weights")
    table = {row["layer"]: row for row in rows(answer.folder / "weights.csv")}
    assert table["features.0.weight"]["shape"] == "32×1×3×3"
    assert int(table["head.weight"]["count"]) == 10 * 64 * 4 * 4
    file = tmp_path / "model.safetensors"
    shutil.copy(trained / "weights" / "model.safetensors", file)
    told = run_cvtrain(tmp_path, "inspect", f"weights={file}", "what=weights", "device=cpu", "json=true")
    assert told.code == 0, told.err
    assert (tmp_path / "outputs" / "inspect_weights") in told.folder.parents


def test_pictures_are_asked_about_what_was_said_and_what_is_true():
    rows = torch.tensor([[0.7, 0.1, 0.2], [0.2, 0.5, 0.3]])
    assert _asked(rows, np.array([2, 1])) == [
        [(0, "predicted"), (2, "true")],
        [(1, "predicted, right"), (2, "2nd")],
    ]
    assert _asked(rows, None) == [[(0, "1st"), (2, "2nd")], [(1, "1st"), (2, "2nd")]]
    # Of several labels those that it is most wrong about: off by 0.7 and 0.8 at first.
    assert _asked(rows, np.array([[0, 0, 1], [0, 1, 0]])) == [
        [(2, "labelled"), (0, "not labelled")],
        [(1, "labelled"), (2, "not labelled")],
    ]
    assert _first_label(np.array([[0, 1, 1], [0, 0, 0]]), 3).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["what=tsne"], "give one of run=FOLDER"),
        (["run={}"], "looks at a run before it is started; leave run out"),
        (["run={}", "what=gradcam", "model=resnet18"], "model=resnet18 means nothing with what=gradcam"),
        (["run={}", "what=tsne", "layer=head"], "layer=head is for what=gradcam; leave it out with what=tsne"),
        (["run={}", "what=gradcam", "source=a.png", "split=val"], "split=val chooses among the run's own pictures"),
        (["run={}", "what=gradcam", "layer=featurs.0"], "layer=featurs.0 is no layer of SimpleCNN; did you mean"),
        (["run=['{}','{}']", "what=gradcam"], "inspect looks at one run; give one folder"),
        (["weights={}/weights/model.safetensors", "what=errors"], "give run=FOLDER in place of weights=."),
    ],
)
def test_what_means_nothing_is_refused_with_what_to_write(trained, tmp_path, words, said):
    answer = run_cvtrain(tmp_path, "inspect", "device=cpu", *(word.replace("{}", str(trained)) for word in words))
    assert answer.code == 2, answer.err
    assert said.replace("{}", str(trained)) in answer.err
    assert len(answer.err.strip().splitlines()) <= 3
