"""`cvtrain inspect what=model`: one network, or several, on the command line."""

import csv

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")

BARE = ["inspect", "what=model", "json=true", "data=folder", "data.root=nowhere"]
PICTURE = ["num_classes=7", "in_channels=1", "img_size=28"]


def test_a_bare_model_is_summed_up_without_any_data(cvtrain):
    answer = cvtrain(*BARE, *PICTURE, "model=lenet5", "batch_size=8", "optimizer=adamw")
    assert answer.code == 0, answer.err
    told = answer.json
    # 5·5·6+6, 5·5·6·16+16, 256·120+120, 120·84+84, 84·7+7
    params = 156 + 2416 + 30840 + 10164 + 595
    assert (told["params"], told["trainable"]) == (params, params)
    assert told["macs"] == 150 * 24 * 24 + 2400 * 8 * 8 + 256 * 120 + 120 * 84 + 84 * 7
    assert (told["receptive_field"], told["stride"]) == (16, "4")
    assert told["activation_bytes"] == 4 * (2 * 6 * 576 + 6 * 144 + 2 * 16 * 64 + 256 + 2 * 120 + 2 * 84 + 7)
    memory = told["memory"]
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (4 * params, 4 * params, 8 * params)
    assert memory["total"] == 16 * params + memory["activations"]
    assert memory["batch_size"] == 8
    assert sorted(told["files"]) == sorted(path.name for path in answer.folder.iterdir()) == ["model.csv", "model.png"]
    rows = list(csv.DictReader((answer.folder / "model.csv").open()))
    assert len(rows) == told["layers"]
    for column in ("params", "macs", "activation_bytes"):
        assert sum(int(row[column]) for row in rows) == told[column]
    assert [row["output"] for row in rows[:3]] == ["6×24×24", "6×24×24", "6×12×12"]
    with Image.open(answer.folder / "model.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_people_get_a_table_by_stages_and_the_memory_in_a_line(cvtrain):
    answer = cvtrain(*(word for word in BARE if word != "json=true"), *PICTURE, "model=lenet5")
    assert answer.code == 0, answer.err
    assert "features.0" in answer.out
    assert "receptive field" in answer.out
    assert "head" in answer.out
    assert "memory of a training step with batch_size=64" in answer.out
    assert answer.out.splitlines()[-3:-1] == ["model.csv", "model.png"]


def test_what_is_not_given_comes_from_the_data(cvtrain):
    told = cvtrain("inspect", "what=model", "json=true", "in_channels=3").json
    assert (told["model"], told["input"], told["num_classes"]) == ("simple_cnn", [3, 8, 8], 10)


def test_several_models_are_compared_on_paper_and_on_the_clock(cvtrain):
    answer = cvtrain(*BARE, *PICTURE, "models=[lenet5,simple_cnn]", "device=cpu")
    assert answer.code == 0, answer.err
    told = answer.json
    assert [model["model"] for model in told["models"]] == ["lenet5", "simple_cnn"]
    assert told["threads"] == 1
    for model in told["models"]:
        assert model["input"] == [1, 28, 28]
        for batch in (1, 16):
            low, middle, high = (model[f"batch_{batch}_ms_p{p}"] for p in (5, 50, 95))
            assert 0 < low <= middle <= high
    rows = list(csv.DictReader((answer.folder / "models.csv").open()))
    assert [int(row["params"]) for row in rows] == [model["params"] for model in told["models"]]
    with Image.open(answer.folder / "models.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_what_the_run_freezes_is_counted_and_takes_less_memory(cvtrain):
    whole = cvtrain(*BARE, *PICTURE, "model=simple_cnn").json
    answer = cvtrain(*BARE, *PICTURE, "model=simple_cnn", "finetune=feature_extraction")
    told = answer.json
    assert (told["params"], whole["trainable"]) == (whole["params"], whole["params"])
    rows = list(csv.DictReader((answer.folder / "model.csv").open()))
    head = sum(int(row["params"]) for row in rows if row["stage"] == "head")
    assert told["trainable"] == sum(int(row["trainable"]) for row in rows) == head
    assert told["memory"]["gradients"] == 4 * head
    assert told["memory"]["activations"] < 0.1 * whole["memory"]["activations"]


def test_options_of_ones_own_folder_can_be_compared(cvtrain, tmp_path):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "wide.yaml").write_text("_target_: cvtrain.model.SimpleCNN\nwidths: [8, 8]\n")
    answer = cvtrain(*BARE, *PICTURE, "-cd", "conf", "models=[wide,simple_cnn]", "model.widths=[4,4]")
    assert answer.code == 0, answer.err
    first, second = answer.json["models"]
    assert first["params"] == second["params"], "other overrides hold for all of them"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["models=[lenet5,resnet81]"], "model=resnet81 is unknown; did you mean"),
        (["model=lenet5", "models=[simple_cnn]"], "contradict each other"),
        (["model=lenet5", "img_size=9"], "16"),
        (["what=lr"], "num_classes=7 is for what=model"),
        (["num_classes=0"], "num_classes=0 is not allowed"),
        (["+model.in_channels=3"], "model.in_channels=3 is set by the run itself"),
    ],
)
def test_a_mistake_is_told_in_one_message(cvtrain, words, expected):
    given = [word for word in (*BARE, *PICTURE) if word.partition("=")[0] not in {w.partition("=")[0] for w in words}]
    answer = cvtrain(*given, *words)
    assert answer.code == 2
    assert expected in answer.err
    assert len(answer.err.strip().splitlines()) <= 3
