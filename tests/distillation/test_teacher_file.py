"""What `distillation.teacher` names is found, checked and refused before the first epoch."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from teacher_file import DIGITS, PREPROCESS, write_teacher

from cvtrain.build import Builder
from cvtrain.command.teacher import load_teacher
from cvtrain.core.files import sha256, write_json
from cvtrain.core.types import Preprocess
from cvtrain.errors import ConfigError, WeightsError

pytestmark = pytest.mark.usefixtures("one_thread")


def load(given, folder, trusted=(), names=DIGITS, preprocess=PREPROCESS, multilabel=False):
    config = {"distillation": {"teacher": None if given is None else str(given)}, "channels_last": True}
    sets = SimpleNamespace(class_names=names, preprocess=preprocess, multilabel=multilabel)
    return load_teacher(Builder(config, list(trusted)), sets, torch.device("cpu"), folder)


def finished(tmp_path, **changes):
    path = write_teacher(tmp_path / "old" / "weights" / "model.safetensors", **changes)
    write_json(path.parent / "manifest.json", {"files": {path.name: [sha256(path)]}})
    return tmp_path / "old"


def test_a_run_folder_and_its_file_are_the_same_teacher(tmp_path, caplog):
    old = finished(tmp_path)
    path = old / "weights" / "model.safetensors"
    images = torch.randn(4, 1, 8, 8)
    with caplog.at_level(logging.INFO, "cvtrain"):
        by_folder, by_file = load(old, tmp_path / "new"), load(path, tmp_path / "new")
    assert torch.equal(by_folder(images), by_file(images))
    assert by_folder.sha256 == by_file.sha256 == sha256(path)
    assert f"teacher {path}, SHA-256 {sha256(path)}" in caplog.text
    assert by_folder.model.features[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_no_teacher_is_no_teacher(tmp_path):
    assert load(None, tmp_path) is None


def test_a_link_to_the_runs_own_folder_is_the_run_itself(tmp_path):
    finished(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "old")
    for given in (tmp_path / "old", tmp_path / "link", tmp_path / "old" / "weights" / "model.safetensors"):
        with pytest.raises(ConfigError, match="is this run itself"):
            load(given, tmp_path / "old")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nowhere", "does not exist; give the folder"),
        ("empty", "holds no run; give the folder"),
    ],
)
def test_a_missing_teacher_is_refused_with_the_fix(given, words, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=words):
        load(tmp_path / given, tmp_path / "new")


def test_one_flipped_bit_of_a_teacher_is_noticed(tmp_path):
    old = finished(tmp_path)
    path = old / "weights" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="is damaged: its SHA-256 is not the one"):
        load(old, tmp_path / "new")


@pytest.mark.parametrize("manifest", ["{", "[]", '{"files": 3}', '{"files": {}}'])
def test_a_teacher_beside_another_manifest_is_taken(manifest, tmp_path):
    path = write_teacher(tmp_path / "model.safetensors")
    (tmp_path / "manifest.json").write_text(manifest)
    assert load(path, tmp_path / "new").sha256 == sha256(path)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x93NUMPY" * 50)
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load(tmp_path / "model.safetensors", tmp_path / "new")


def test_a_teachers_config_runs_nothing_that_was_not_allowed(tmp_path):
    path = write_teacher(tmp_path / "model.safetensors", target="os.system")
    with pytest.raises(ConfigError, match=r"_target_=os\.system is refused"):
        load(path, tmp_path / "new")


def test_a_teacher_of_another_task_classes_or_channels_is_refused(tmp_path):
    multilabel = write_teacher(tmp_path / "a.safetensors", task="multilabel")
    fewer = write_teacher(tmp_path / "b.safetensors", names=DIGITS[:9])
    colour = write_teacher(tmp_path / "c.safetensors", preprocess=Preprocess(8, 8, 3, (0.5,) * 3, (0.5,) * 3))
    for path, words in (
        (multilabel, "gives a picture several labels, this run's data one class; choose a teacher"),
        (fewer, r"9 classes, this run 10: 1 unknown to it \('9'\)"),
        (colour, "sees 3 channels, this run 1"),
    ):
        with pytest.raises(ConfigError, match=words) as refused:
            load(path, tmp_path / "new")
        assert str(refused.value).count("\n") <= 2
    assert load(multilabel, tmp_path / "new", multilabel=True) is not None


def test_weights_that_do_not_fit_their_own_config_are_refused(tmp_path):
    path = write_teacher(tmp_path / "model.safetensors")
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        metadata = file.metadata()
    save_file(tensors, path, {**metadata, "model": json.dumps({"_target_": "cvtrain.model.SimpleCNN", "widths": [6]})})
    with pytest.raises(WeightsError, match="does not fit this model"):
        load(path, tmp_path / "new")
