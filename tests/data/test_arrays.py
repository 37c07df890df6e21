"""Data sets that are arrays: digits, MNIST's family, CIFAR, and the options of configs/data."""

import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from PIL import Image
from real_formats import idx, write_cifar10, write_cifar100, write_mnist

from cvtrain.core.types import DataSets, Preprocess
from cvtrain.data import CIFAR10, CIFAR100, MNIST, ArraySource, Digits, FashionMNIST
from cvtrain.data.source import ResizingSource, resize_all
from cvtrain.data.splits import checked, stratified
from cvtrain.errors import ConfigError, DataError

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
OPTIONS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def merged(option):
    """The option over the bases it names, as Hydra composes it."""
    config = OmegaConf.load(CONFIGS / f"{option}.yaml")
    named = [name.removeprefix("base/").removesuffix("@_here_") for name in config.pop("defaults") if "@_here_" in name]
    bases = [
        OmegaConf.load(CONFIGS / "base" / f"{name}.yaml") for name in (["common"] + [n for n in named if n != "common"])
    ]
    for base in bases:
        base.pop("defaults", None)
    return OmegaConf.merge(*bases, config)


def images(source):
    return source.read(np.arange(len(source)))


def test_there_are_fifteen_options():
    published = "cifar10 cifar100 fashion_mnist flowers102 food101 imagenet mnist oxford_pet stl10 svhn"
    assert sorted([*published.split(), "csv", "digits", "folder", "hf", "shards"]) == OPTIONS


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_states_every_argument_of_its_class_and_nothing_else(option, tmp_path):
    config = merged(option)
    overrides = config.pop("aug_overrides")
    target = get_class(config["_target_"])
    parameters = inspect.signature(target).parameters
    assert set(config) - {"_target_"} == set(parameters)
    for name, parameter in parameters.items():
        if name not in ("mean", "std"):
            assert config[name] == parameter.default, name
    assert set(overrides) <= {"horizontal_flip", "vertical_flip", "random_crop"}
    if "root" in config:
        config.root = str(tmp_path)
    assert isinstance(instantiate(config), target)
    first = (CONFIGS / f"{option}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert 10 < len(first) <= 120


def test_letters_and_digits_are_never_mirrored():
    for option in ("digits", "mnist"):
        overrides = OmegaConf.load(CONFIGS / f"{option}.yaml").aug_overrides
        assert overrides.horizontal_flip is None
        assert overrides.vertical_flip is None


def test_importing_the_package_imports_neither_scikit_learn_nor_torchvision():
    code = "import cvtrain.data, sys; print([m for m in ('sklearn', 'torchvision') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_digits_split_into_three_disjoint_stratified_parts_of_1797_pictures():
    data = Digits()
    sets = data.load(None, 1.0, 0)
    assert sets.counts() == {"train": 1259, "val": 179, "test": 359, "skipped": 0}
    names = [set(data.splits[split]) for split in ("train", "val", "test")]
    assert len(set.union(*names)) == 1797
    for source, share in ((sets.val, 0.1), (sets.test, 0.2)):
        shares = np.bincount(source.labels) / np.bincount(
            np.concatenate([s.labels for s in (sets.train, sets.val, sets.test)])
        )
        assert np.abs(shares - share).max() < 0.005


def test_digits_keep_their_sixteen_levels_scaled_to_bytes_and_their_labels():
    from sklearn.datasets import load_digits

    raw = load_digits()
    sets = Digits().load(None, 1.0, 0)
    assert images(sets.train).dtype == torch.uint8
    assert int(images(sets.train).max()) == 255
    for source in (sets.train, sets.val, sets.test):
        where = np.array([int(name) for name in source.names])
        levels = np.round(images(source)[:, 0].numpy() * (16 / 255))
        np.testing.assert_array_equal(levels, raw.images[where])
        np.testing.assert_array_equal(source.labels, raw.target[where])


def test_statistics_that_are_not_given_are_those_of_the_training_part():
    sets = Digits().load(None, 1.0, 0)
    values = images(sets.train).double() / 255
    assert sets.preprocess.mean[0] == pytest.approx(float(values.mean()), abs=1e-4)
    assert sets.preprocess.std[0] == pytest.approx(float(values.std(correction=0)), abs=1e-4)


def test_the_split_follows_its_own_seed():
    first, again, other = Digits(), Digits(), Digits(split_seed=1)
    for data in (first, again, other):
        data.load(None, 1.0, 0)
    assert first.splits == again.splits
    assert first.splits != other.splits


@pytest.mark.parametrize(
    ("img_size", "eval_resize", "sides"), [(None, 1.0, (8, 8)), (28, 1.0, (28, 28)), (28, 1.14, (28, 32))]
)
def test_pictures_are_read_at_img_size_times_eval_resize(img_size, eval_resize, sides):
    sets = Digits().load(img_size, eval_resize, 2)
    assert (sets.preprocess.img_size, sets.preprocess.resize) == sides
    for source in (sets.train, sets.val, sets.test):
        assert tuple(source.read(np.array([0, 1])).shape) == (2, 1, sides[1], sides[1])


def test_resizing_equals_pillows_bilinear_of_the_centre_with_any_number_of_threads():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 20, 32, 3), dtype=np.uint8)
    expected = []
    for picture in pixels:
        resized = Image.fromarray(picture).resize((16, 10), Image.Resampling.BILINEAR)
        expected.append(np.array(resized.crop((3, 0, 13, 10))))
    expected = torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2)
    for workers in (0, 3):
        assert torch.equal(resize_all(pixels, 10, workers), expected)


def test_a_set_too_large_for_memory_is_resized_as_it_is_read(monkeypatch):
    whole = Digits().load(20, 1.0, 0)
    monkeypatch.setattr("cvtrain.data.source.MEMORY_LIMIT", 1000)
    lazy = Digits().load(20, 1.0, 0)
    assert isinstance(whole.train, ArraySource)
    assert isinstance(lazy.train, ResizingSource)
    where = np.array([3, 700, 0])
    assert torch.equal(lazy.train.read(where), whole.train.read(where))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("folder", ["", "raw", "MNIST/raw", "FashionMNIST/raw"])
def test_idx_files_are_found_plain_or_gzipped_in_the_usual_folders(tmp_path, folder, packed):
    arrays = write_mnist(tmp_path / folder, packed=packed)
    data = MNIST(root=str(tmp_path))
    sets = data.load(None, 1.0, 0)
    assert sets.counts() == {"train": 50, "val": 10, "test": 20, "skipped": 0}
    np.testing.assert_array_equal(images(sets.test)[:, 0].numpy(), arrays["t10k-images-idx3-ubyte"])
    for source in (sets.train, sets.val):
        where = [int(name.removeprefix("train/")) for name in source.names]
        np.testing.assert_array_equal(images(source)[:, 0].numpy(), arrays["train-images-idx3-ubyte"][where])
        np.testing.assert_array_equal(source.labels, arrays["train-labels-idx1-ubyte"][where])


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda b: b[:-1], "there are only"),
        (lambda b: b + b"x", "there are more"),
        (lambda b: b"<html>404</html>", "not an IDX file"),
        (lambda b: b"", "not an IDX file"),
        (lambda b: bytes([0, 0, 13, 3]) + b[4:], "not an IDX file"),
        (lambda b: b[:4] + b"\xff" * 12 + b[16:], "damaged"),
    ],
)
def test_a_damaged_idx_file_is_refused_by_name(tmp_path, damage, text):
    write_mnist(tmp_path, packed=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=text) as error:
        MNIST(root=str(tmp_path)).load(None, 1.0, 0)
    assert str(path) in str(error.value)


def test_a_truncated_gzip_file_is_refused_by_name(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged") as error:
        MNIST(root=str(tmp_path)).load(None, 1.0, 0)
    assert str(path) in str(error.value)


def test_a_label_out_of_range_is_refused_with_its_place(tmp_path):
    write_mnist(tmp_path, packed=False)
    labels = np.arange(20, dtype=np.uint8) % 10
    labels[7] = 10
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(DataError, match=r"first 10 at test/7\n  allowed: 0 to 9"):
        MNIST(root=str(tmp_path)).load(None, 1.0, 0)


@pytest.mark.parametrize(
    ("target", "files"),
    [
        (MNIST, ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]),
        (FashionMNIST, ["train-images-idx3-ubyte"]),
        (CIFAR10, ["cifar-10-batches-py", "data_batch_5", "test_batch", "batches.meta"]),
        (CIFAR100, ["cifar-100-python", "train", "meta"]),
    ],
)
def test_an_absent_set_names_the_absolute_folder_the_files_and_both_fixes(target, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        target().load(None, 1.0, 0)
    text = str(error.value)
    for part in [str(tmp_path / "data" / target.name), "data.root=DIR", "data.download=true", *files]:
        assert part in text
    assert error.value.exit_code == 3
    assert text.count("\n") <= 2
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_fails_is_a_data_error_with_the_reason(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no route to host")

    monkeypatch.setattr("torchvision.datasets.MNIST", refuse)
    with pytest.raises(DataError, match="no route to host"):
        MNIST(root=str(tmp_path), download=True).load(None, 1.0, 0)


def test_a_download_that_works_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda root, **_: write_mnist(Path(root) / "MNIST" / "raw"))
    assert MNIST(root=str(tmp_path), download=True).load(None, 1.0, 0).counts()["test"] == 20


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist_reads_whole_and_has_its_published_statistics():
    sets = FashionMNIST(root=str(DEBIAN), mean=None, std=None).load(None, 1.0, 0)
    assert sets.counts() == {"train": 54000, "val": 6000, "test": 10000, "skipped": 0}
    assert np.bincount(sets.train.labels).tolist() == [5400] * 10
    published = OmegaConf.load(CONFIGS / "fashion_mnist.yaml")
    assert sets.preprocess.mean[0] == pytest.approx(published.mean[0], abs=1e-3)
    assert sets.preprocess.std[0] == pytest.approx(published.std[0], abs=1e-3)


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-py"])
def test_cifar10_reads_planes_as_colours_and_maps_names(tmp_path, folder):
    written = write_cifar10(tmp_path / folder, protocol=4)
    sets = CIFAR10(root=str(tmp_path)).load(None, 1.0, 0)
    assert sets.counts() == {"train": 90, "val": 10, "test": 20, "skipped": 0}
    assert sets.class_names[3] == "class3"
    np.testing.assert_array_equal(images(sets.test).numpy(), written["test_batch"].reshape(-1, 3, 32, 32))
    everything = np.concatenate([written[f"data_batch_{i}"] for i in range(1, 6)]).reshape(-1, 3, 32, 32)
    where = [int(name.removeprefix("train/")) for name in sets.train.names]
    np.testing.assert_array_equal(images(sets.train).numpy(), everything[where])


def test_cifar100_reads_the_fine_labels(tmp_path):
    write_cifar100(tmp_path / "cifar-100-python")
    sets = CIFAR100(root=str(tmp_path)).load(None, 1.0, 0)
    assert sets.counts() == {"train": 300, "val": 100, "test": 100, "skipped": 0}
    assert sets.num_classes == 100
    assert sets.test.labels.tolist() == list(range(100))


def test_a_pickle_written_by_python_2_is_read(tmp_path):
    write_cifar10(tmp_path, protocol=4)
    # What Python 2's cPickle writes for {"label_names": ["a", "b"]}: byte strings, protocol 2.
    body = b"\x80\x02}q\x01U\x0blabel_namesq\x02]q\x03(" + b"".join(b"U\x01%c" % c for c in b"abcdefghij") + b"es."
    (tmp_path / "batches.meta").write_bytes(body)
    assert CIFAR10(root=str(tmp_path)).load(None, 1.0, 0).class_names == list("abcdefghij")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class HostileEval:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("hostile", [Hostile, HostileEval])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, hostile, protocol):
    write_cifar10(tmp_path, protocol=4)
    mark = tmp_path / "owned"
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({"data": hostile(mark)}, protocol))
    with pytest.raises(DataError, match="data_batch_3: refused or damaged: it asks for"):
        CIFAR10(root=str(tmp_path)).load(None, 1.0, 0)
    assert not mark.exists()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": 3, "labels": []}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, 4),
        pickle.dumps({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}, 4),
    ],
)
def test_a_damaged_or_foreign_pickle_is_refused_by_name(tmp_path, body):
    write_cifar10(tmp_path, protocol=4)
    (tmp_path / "test_batch").write_bytes(body)
    with pytest.raises(DataError, match="test_batch"):
        CIFAR10(root=str(tmp_path)).load(None, 1.0, 0)


def test_stratified_parts_are_disjoint_complete_and_reach_small_classes():
    labels = np.array([0] * 100 + [1] * 10 + [2] * 3 + [3] * 2 + [4])
    train, val, test = stratified(labels, (0.1, 0.2), seed=0)
    assert sorted([*train, *val, *test]) == list(range(116))
    assert np.bincount(labels[val], minlength=5).tolist() == [10, 1, 1, 1, 0]
    assert np.bincount(labels[test], minlength=5).tolist() == [20, 2, 1, 0, 0]


def test_fractions_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(ConfigError, match="sum to 1"):
        Digits(val_fraction=0.5, test_fraction=0.5).load(None, 1.0, 0)
    with pytest.raises(ConfigError, match="val_fraction=0"):
        Digits(val_fraction=0.0)


def tiny(labels, classes=("a", "b")):
    source = ArraySource(
        torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), np.array(labels), [str(i) for i in range(len(labels))]
    )
    good = ArraySource(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), np.array([0, 1]), ["0", "1"])
    return DataSets("tiny", list(classes), Preprocess(2, 2, 1, (0.5,), (0.5,)), good, source, good)


def test_minus_100_an_empty_split_and_a_single_class_are_refused():
    assert len(checked(tiny([0, 1])).val) == 2
    with pytest.raises(DataError, match="first -100 at 1"):
        checked(tiny([0, -100]))
    with pytest.raises(DataError, match="the val split is empty"):
        checked(tiny([]))
    with pytest.raises(DataError, match="one class"):
        checked(tiny([0], classes=["a"]))


def test_statistics_that_do_not_fit_the_channels_are_refused():
    with pytest.raises(ConfigError, match="do not fit 1 channel"):
        Digits(mean=[0.5, 0.5, 0.5]).load(None, 1.0, 0)
    with pytest.raises(ConfigError, match="std above 0"):
        Digits(std=[0.0]).load(None, 1.0, 0)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_channels_that_are_no_colours_are_resized_each_by_itself(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 12, channels), dtype=np.uint8)
    pixels[..., -1] = 0  # Pillow would take it for full transparency
    alone = [resize_all(pixels[..., i : i + 1].copy(), 8, 0) for i in range(channels)]
    assert torch.equal(resize_all(pixels, 8, 0), torch.cat(alone, dim=1))
