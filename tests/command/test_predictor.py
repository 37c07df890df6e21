"""The Predictor: which artifact answers, what a picture may be, and what is said of it."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from artifact_files import described, write_linear
from finished_folder import COLOURS, PREPARED, SIDE, write_nearest, write_run
from PIL import Image
from teacher_file import write_teacher
from ugly import BLUE, GREEN, GREY, RED, quadrants

import cvtrain
from cvtrain.command.predictor import Predictor, probabilities
from cvtrain.core.artifact import Artifact
from cvtrain.core.types import Preprocess
from cvtrain.data import read_picture
from cvtrain.errors import ConfigError, DataError, WeightsError
from cvtrain.evaluation import to_probabilities

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def onnx(tmp_path):
    return write_nearest(tmp_path / "model.onnx", temperature="0.5").path


@pytest.fixture
def run(tmp_path):
    """A run with a float ONNX file, and a faster one that answers otherwise."""
    folder = tmp_path / "run"
    model = Artifact("fp32", write_teacher(folder / "weights" / "model.safetensors", list(COLOURS), PREPARED), "torch",
                     0, 0)  # fmt: skip
    slow = dataclasses.replace(write_nearest(folder / "export" / "slow.onnx"), name="slow")
    fast = dataclasses.replace(write_nearest(folder / "export" / "model.onnx"), name="onnx")
    wrong = dataclasses.replace(write_nearest(folder / "compressed" / "int8.onnx"), name="int8", exact=False)
    return write_run(folder, [(model, 5.0), (slow, 3.0), (fast, 2.0), (wrong, 1.0)], winner="int8")


def test_auto_takes_the_winner_and_another_artifact_by_its_name(run):
    assert cvtrain.load(run).artifact.name == "int8"
    for name in ("fp32", "slow", "onnx"):
        assert cvtrain.load(str(run), artifact=name).artifact.name == name


def test_without_a_winner_auto_takes_the_fastest_with_the_models_own_answers(run):
    (run / "metrics.json").write_text('{"winner": null}')
    assert Predictor(run).artifact.name == "onnx"
    (run / "metrics.json").unlink()
    assert Predictor(run).artifact.name == "onnx"


def test_without_exports_auto_takes_the_weights(tmp_path):
    folder = write_run(tmp_path / "run")
    write_teacher(folder / "weights" / "model.safetensors", list(COLOURS), PREPARED)
    found = Predictor(folder)
    assert (found.artifact.runtime, found.artifact.path) == ("torch", folder / "weights" / "model.safetensors")
    assert Predictor(folder, artifact="fp32").artifact == found.artifact
    (folder / "artifacts.csv").write_text("artifact,file\nfp32,weights/model.safetensors\n")  # of an older cvtrain
    assert Predictor(folder).artifact == found.artifact


def test_files_that_may_run_code_are_taken_only_by_name(run):
    table = (run / "artifacts.csv").read_text()
    lines = [line.replace("onnxruntime", "torchscript") if line[:4] in ("int8", "onnx") else line
             for line in table.splitlines()]  # fmt: skip
    (run / "artifacts.csv").write_text("\n".join(lines) + "\n")
    assert Predictor(run).artifact.name == "slow"
    with pytest.raises(WeightsError, match="torchscript cannot load"):
        Predictor(run, artifact="int8")


def test_a_device_of_its_own_is_for_the_float_model(run):
    assert Predictor(run, device="cpu").artifact.name == "int8"
    with pytest.raises(ConfigError, match="device=nonsense is not available here"):
        Predictor(run, device="nonsense")
    with pytest.raises(ConfigError, match=r"run by onnxruntime\.\nLeave device= out, or take artifact=fp32"):
        Predictor(run, artifact="onnx", device="cuda")


def test_what_is_missing_wrong_or_changed_is_named(run, tmp_path):
    with pytest.raises(ConfigError, match="artifact=onxx: did you mean 'onnx'"):
        Predictor(run, artifact="onxx")
    with pytest.raises(ConfigError, match=r"is not a run folder: it has no args\.yaml"):
        Predictor(tmp_path)
    with pytest.raises(WeightsError, match=r"no file at .*gone\.onnx"):
        Predictor(tmp_path / "gone.onnx")
    with pytest.raises(ConfigError, match="artifact=onnx chooses among the files of a run folder"):
        Predictor(run / "export" / "model.onnx", artifact="onnx")
    path = run / "compressed" / "int8.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"int8\.onnx has changed since it was proved"):
        Predictor(run)
    assert Predictor(run, artifact="onnx").artifact.name == "onnx"
    (run / "artifacts.csv").unlink()
    (run / "weights" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"has no weights/model\.safetensors"):
        Predictor(run)


def test_a_picture_may_be_a_path_bytes_an_image_or_an_array(onnx, tmp_path):
    image = quadrants((GREEN, RED, BLUE, GREY), side=40)
    image.save(tmp_path / "x.png")
    content, pixels = (tmp_path / "x.png").read_bytes(), np.asarray(image)
    given = [str(tmp_path / "x.png"), tmp_path / "x.png", content, image, pixels, image.convert("P"), pixels[:, ::-1]]
    answers = Predictor(onnx).predict(given, topk=6)
    assert [answer.name for answer in answers] == [str(given[0]), str(given[0]), "#2", "#3", "#4", "#5", "#6"]
    assert [answer.label for answer in answers] == ["green"] * 6 + ["red"]
    assert len({answer.classes for answer in answers[:5]}) == 1
    for single in (given[0], content, image, pixels):
        (answer,) = Predictor(onnx).predict(single, topk=6)
        assert answer.classes == answers[0].classes


def test_grey_and_transparent_arrays_become_what_the_model_takes(onnx):
    grey = np.full((20, 30), 126, np.uint8)
    clear = np.zeros((20, 30, 4), np.uint8)
    answers = Predictor(onnx).predict([grey, grey[..., None], clear])
    assert [answer.label for answer in answers] == ["grey", "grey", "white"]


def test_an_image_is_turned_as_its_exif_says_and_left_as_it_was(onnx, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    quadrants((RED, RED, RED, BLUE), side=400).save(tmp_path / "x.jpg", exif=exif, quality=95)
    image = Image.open(tmp_path / "x.jpg")
    answers = Predictor(onnx).predict([image, tmp_path / "x.jpg"])
    assert [answer.label for answer in answers] == ["blue", "blue"]
    assert image.size == (400, 400)


def test_other_numbers_of_channels_come_as_arrays(tmp_path):
    prepared = Preprocess(4, 4, 6, (0.0,) * 6, (1.0,) * 6)
    weight = np.zeros((2, 6 * 16), np.float32)
    weight[1, 5 * 16 :] = 1 / 16
    path = write_linear(tmp_path / "six.onnx", weight, np.array([0.5, 0.0]), described("ab", prepared)).path
    dark, light = np.zeros((9, 7, 6), np.uint8), np.full((9, 7, 6), 255, np.uint8)
    light[..., :5] = 0
    six = Predictor(path)
    assert [answer.label for answer in six.predict([dark, light])] == ["a", "b"]
    quadrants().save(tmp_path / "x.png")
    with pytest.raises(DataError) as error:
        six.predict([tmp_path / "x.png", dark[..., :3], dark])
    assert str(error.value).splitlines() == [
        f"{tmp_path}/x.png: files are read for models of 1 or 3 channels, not 6",
        "#1: 3 channels for a model of 6",
    ]


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), np.zeros((2, 2, 2, 3), np.uint8)]
)
def test_an_array_of_another_kind_is_refused(onnx, array):
    with pytest.raises(DataError, match=r"#0: an array .*; give uint8 \(height, width, channels\)"):
        Predictor(onnx).predict([array])


def test_predict_names_all_that_cannot_be_read_and_stream_answers_the_others(onnx, tmp_path):
    quadrants().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    given = [str(tmp_path / name) for name in ("a.png", "b.png", "gone.png", "a.png")]
    found = Predictor(onnx)
    with pytest.raises(DataError) as error:
        found.predict(given)
    assert [line.partition(": ")[0] for line in str(error.value).splitlines()] == given[1:3]
    for batch_size in (1, 2, 3, 32):
        answers = list(found.stream(given, batch_size))
        assert [answer.name for answer in answers] == given
        assert [answer.error is None for answer in answers] == [True, False, False, True]
        assert answers[0].label == answers[3].label == "red"
        with pytest.raises(DataError, match=r"b\.png: not a picture"):
            _ = answers[1].label


def test_a_stream_takes_one_batch_at_a_time(onnx):
    taken = []

    def endless():
        number = 0
        while True:
            taken.append(number)
            number += 1
            yield np.full((4, 4, 3), number % 256, np.uint8)

    stream = Predictor(onnx).stream(endless(), batch_size=7)
    assert taken == []
    for number in range(50):
        next(stream)
        assert len(taken) == 7 * (number // 7 + 1)


def test_each_answer_is_its_own_pictures_whatever_the_batch(onnx):
    colours = list(COLOURS.items())
    names, values = zip(*(colours[i] for i in np.random.default_rng(0).integers(0, 6, 40)), strict=True)
    arrays = [np.full((5, 9, 3), value, np.uint8) for value in values]
    found = Predictor(onnx)
    for batch_size in (1, 16, 64):
        assert [answer.label for answer in found.predict(arrays, batch_size=batch_size)] == list(names)


@pytest.mark.parametrize("multilabel", [False, True])
def test_probabilities_are_those_that_val_computes(multilabel):
    logits = np.random.default_rng(1).normal(0, 5, (50, 7)).astype(np.float32)
    logits[0] = [1000, -1000, 0, 90, -90, 100, 3]
    given = probabilities(logits, 1.7, multilabel)
    assert given.dtype == np.float32
    assert np.allclose(given, to_probabilities(torch.from_numpy(logits), 1.7, multilabel).numpy(), atol=1e-6)


@pytest.mark.parametrize("task", ["classification", "multilabel"])
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_all_classes_come_calibrated_the_likeliest_first(tmp_path, task, kind):
    prepared = Preprocess(SIDE, SIDE + 2, 3, (0.3,) * 3, (0.4,) * 3, "bicubic")
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (31, 22, 3), dtype=np.uint8))
    image.save(tmp_path / "x.png")
    pixels = prepared(read_picture(str(tmp_path / "x.png"), SIDE + 2, 3, interpolation="bicubic")[None])
    if kind == "torch":
        from cvtrain.command.deployed import load_file
        from cvtrain.core.weights import save_weights

        shipped = load_file(write_teacher(tmp_path / "m.safetensors", "abcd", prepared, task=task),
                            torch.device("cpu"), [])  # fmt: skip
        path = tmp_path / "warm.safetensors"
        save_weights(shipped.model, path, {**shipped.metadata, "temperature": "2.5"})
        with torch.no_grad():
            logits = shipped.model(pixels)[0]
    else:
        weight = np.random.default_rng(3).normal(0, 0.2, (4, 3 * SIDE**2)).astype(np.float32)
        metadata = described("abcd", prepared, temperature="2.5", task=task)
        path = write_linear(tmp_path / "m.onnx", weight, np.zeros(4), metadata).path
        logits = torch.from_numpy(weight) @ pixels.flatten()
    expected = (logits / 2.5).softmax(0) if task == "classification" else (logits / 2.5).sigmoid()
    (answer,) = Predictor(path).predict([tmp_path / "x.png"], topk=9)
    assert [name for name, _ in answer.classes] == ["abcd"[k] for k in expected.argsort(descending=True)]
    assert [value for _, value in answer.classes] == pytest.approx(expected.sort(descending=True).values, abs=1e-5)
    assert (answer.label, answer.probability) == answer.classes[0]
    likely = tuple(name for name, value in zip("abcd", expected, strict=True) if value >= 0.5)
    assert answer.labels == (likely if task == "multilabel" else None)


def test_a_file_with_everything_inside_gets_bytes_and_its_probabilities_are_taken_as_they_are(tmp_path):
    prepared = Preprocess(SIDE, SIDE, 3, (0.5,) * 3, (0.5,) * 3)
    weight = np.random.default_rng(4).normal(0, 0.001, (3, 3 * SIDE**2))
    metadata = described("abc", prepared, temperature="3")
    path = write_linear(tmp_path / "m.onnx", weight, np.zeros(3), metadata, embed=True).path
    image = np.random.default_rng(5).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    logits = weight @ image.transpose(2, 0, 1).ravel()
    expected = np.exp(logits) / np.exp(logits).sum()
    (answer,) = Predictor(path).predict([image], topk=3)
    assert dict(answer.classes) == pytest.approx(dict(zip("abc", expected, strict=True)), abs=1e-5)


def test_damaged_preprocessing_is_refused(tmp_path):
    values = {**PREPARED.to_dict(), "interpolation": "nearest"}
    metadata = {"class_names": json.dumps(["a", "b"]), "preprocess": json.dumps(values)}
    path = tmp_path / "m.onnx"
    write_linear(path, np.zeros((2, 3 * SIDE**2)), np.zeros(2), described("ab", PREPARED))
    import onnx as library

    model = library.load(path)
    library.helper.set_model_props(model, metadata)
    library.save(model, path)
    with pytest.raises(WeightsError, match="damaged preprocessing"):
        Predictor(path)


def test_encoded_bytes_that_are_no_picture_are_named_by_their_position(onnx):
    whole = io.BytesIO()
    quadrants().save(whole, "JPEG")
    answers = list(Predictor(onnx).stream([whole.getvalue(), whole.getvalue()[:300], b""]))
    assert [answer.error is None for answer in answers] == [True, False, False]
    assert answers[1].error.startswith("#1: ")
    assert answers[2].error == "#2: empty file"
