"""Albumentations from YAML lists: purity, groups, refusals, and what is said when it is not installed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cvtrain.aug import AlbumentationsTransform
from cvtrain.core.random import sample_uniforms
from cvtrain.core.types import Preprocess
from cvtrain.errors import ConfigError

PRESETS = Path(__file__).parents[2] / "configs" / "aug"


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    return pytest.importorskip("albumentations")


def preset(name):
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text())["sample"]["albumentations"]["transforms"]


def pictures(count, channels=3, side=32):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=g)
    return images.contiguous(memory_format=torch.channels_last)


def draws(rows, seed=0, epoch=0):
    return lambda n: sample_uniforms(seed, epoch, np.asarray(rows), "albumentations", n)


@pytest.mark.parametrize("name", ["albumentations", "albumentations_hard"])
def test_a_preset_is_a_function_of_seed_epoch_and_sample_alone(library, name):
    images, rows = pictures(24), np.arange(24)
    transform = AlbumentationsTransform(preset(name))
    before = images.clone()
    whole = transform(images, draws(rows))
    assert whole.shape == images.shape
    assert whole.dtype == torch.uint8
    assert torch.equal(images, before)
    # Another object, other neighbours, another order, another layout.
    some = np.array([23, 4, 11])
    part = AlbumentationsTransform(preset(name))(images[some].contiguous(), draws(some))
    assert torch.equal(part, whole[some])
    assert not torch.equal(transform(images, draws(rows, epoch=1)), whole)
    assert not torch.equal(transform(images, draws(rows, seed=1)), whole)


RANDOM_INSIDE = ["AdditiveNoise", "CoarseDropout", "ElasticTransform", "GaussNoise", "GlassBlur", "GridDistortion"]
RANDOM_INSIDE += ["ISONoise", "PixelDropout", "PlasmaBrightnessContrast", "RandomRain", "SaltAndPepper", "ShotNoise"]


@pytest.mark.parametrize("name", RANDOM_INSIDE)
def test_a_transform_that_draws_a_number_a_pixel_consumes_nobody_elses(library, name):
    images, rows = pictures(5), np.arange(5)
    transform = AlbumentationsTransform([{"name": name, "p": 1.0}])
    whole = transform(images, draws(rows))
    np.random.seed(99)
    for row in (4, 0, 2):
        assert torch.equal(transform(images[[row]], draws([row]))[0], whole[row])


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", ["albumentations", "albumentations_hard"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_preset_takes_any_number_of_channels_and_sizes_from_digits_up_without_a_warning(library, name, channels):
    transform = AlbumentationsTransform(preset(name))
    for side in (8, 33):
        images = pictures(60, channels, side)
        assert transform(images, draws(range(60))).shape == images.shape


@pytest.mark.parametrize("channels", [1, 5])
def test_grey_and_many_channel_pictures_pass_through(library, channels):
    images = pictures(6, channels)
    flipped = AlbumentationsTransform([{"name": "HorizontalFlip", "p": 1.0}])(images, draws(range(6)))
    assert torch.equal(flipped, images.flip(-1))


def test_transforms_of_one_list_are_drawn_independently(library):
    images, rows = pictures(4000, 1, 4), range(4000)
    both = [{"name": "HorizontalFlip", "p": 0.5}, {"name": "VerticalFlip", "p": 0.5}]
    result = AlbumentationsTransform(both)(images, draws(rows))
    shares = [
        float((result == expected).flatten(1).all(dim=1).double().mean())
        for expected in (images, images.flip(-1), images.flip(-2), images.flip(-1).flip(-2))
    ]
    assert all(abs(share - 0.25) < 0.03 for share in shares), shares


def test_one_of_applies_exactly_one_of_its_group(library):
    images = pictures(400, 1, 4)
    group = [{"name": "HorizontalFlip", "p": 1.0}, {"name": "VerticalFlip", "p": 1.0}]
    result = AlbumentationsTransform([{"name": "OneOf", "p": 1.0, "transforms": group}])(images, draws(range(400)))
    across, down = ((result == images.flip(dim)).flatten(1).all(dim=1) for dim in (-1, -2))
    assert bool((across ^ down).all())
    assert 0.4 < float(across.double().mean()) < 0.6


def test_groups_nest(library):
    inner = {"name": "Sequential", "p": 1.0, "transforms": [{"name": "HorizontalFlip", "p": 1.0}]}
    outer = {"name": "SomeOf", "n": 1, "p": 1.0, "transforms": [inner, inner]}
    images = pictures(5)
    assert torch.equal(AlbumentationsTransform([outer])(images, draws(range(5))), images.flip(-1))


def test_a_change_of_size_that_comes_back_is_allowed(library):
    there_and_back = [{"name": "Resize", "height": 8, "width": 8}, {"name": "Resize", "height": 32, "width": 32}]
    assert AlbumentationsTransform(there_and_back)(pictures(2), draws(range(2))).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([{"name": "HorizontalFlp"}], "transforms.0.name=HorizontalFlp is unknown; did you mean 'HorizontalFlip'"),
        ([{"name": "Compose", "transforms": [{"name": "check_for_updates"}]}], "name=check_for_updates is unknown"),
        ([{"name": "HorizontalFlip", "prob": 0.5}], "HorizontalFlip has no prob; .*arguments: p"),
        ([{"name": "GaussianBlur", "blur_limit": "wide"}], "transforms.0: GaussianBlur refuses its arguments"),
        ([{"name": "OneOf", "p": 0.5}], "OneOf needs a list under `transforms`"),
        (["HorizontalFlip"], "transforms.0=HorizontalFlip is not a transform; write"),
    ],
)
def test_a_bad_entry_is_refused_when_the_run_is_built(library, entries, text):
    with pytest.raises(ConfigError, match=text):
        AlbumentationsTransform(entries)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"name": "Resize", "height": 8, "width": 8}, r"into uint8 of \(8, 8, 3\)"),
        ({"name": "Normalize"}, "into float32"),
        ({"name": "ToTensorV2"}, r"into torch.uint8 of \(3, 32, 32\)"),
        ({"name": "RandomCrop", "height": 64, "width": 64}, r"fails on pictures of \(32, 32, 3\)"),
    ],
)
def test_a_list_that_changes_size_or_type_or_fails_is_refused_before_training(library, entry, text):
    transform = AlbumentationsTransform([entry])
    with pytest.raises(ConfigError, match=text):
        transform.adapt(Preprocess(32, 32, 3, (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(ConfigError, match=text):
        transform(pictures(2), draws(range(2)))


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_importing_it_asks_nobody_for_a_newer_version(library):
    answer = run_python(
        "import socket, sys\n"
        "asked = []\n"
        "sys.addaudithook(lambda event, args: asked.append(event) if event.startswith('socket.') else None)\n"
        "from cvtrain.aug import AlbumentationsTransform\n"
        "del asked[:]\n"
        "AlbumentationsTransform([{'name': 'HorizontalFlip'}])\n"
        "print('albumentations' in sys.modules, [e for e in asked if e != 'socket.gethostname'])\n"
    )
    assert answer.stdout.strip() == "True []", answer.stderr


def test_without_it_the_message_names_the_extra():
    answer = run_python(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'albumentations':\n"
        "            raise ModuleNotFoundError('No module named ' + repr(name), name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from cvtrain.aug import AlbumentationsTransform\n"
        "from cvtrain.errors import ConfigError\n"
        "try:\n"
        "    AlbumentationsTransform([{'name': 'HorizontalFlip'}])\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    assert "No module named 'albumentations'" in answer.stdout, answer.stderr
    assert "pip install 'cvtrain[albumentations]'" in answer.stdout
