"""The pipeline, and every option of configs/aug."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torchvision.transforms.v2 import functional as tv

from cvtrain.aug import Affine, Augmentation, ColorJitter, HorizontalFlip, MixUp, RandomCrop, RandomErasing
from cvtrain.core.types import Preprocess

CONFIGS = Path(__file__).parents[2] / "configs"

SAMPLE_KEYS = {
    "none": [],
    "weak": ["horizontal_flip", "random_crop"],
    "standard": ["horizontal_flip", "random_crop", "color_jitter", "random_erasing"],
    "strong": ["horizontal_flip", "random_crop", "color_jitter", "rotation", "random_erasing"],
    "imagenet": ["random_resized_crop", "horizontal_flip", "rotation", "color_jitter", "translate", "random_erasing"],
    "affine": ["affine"],
    "mixup": ["horizontal_flip", "random_crop"],
    "cutmix": ["horizontal_flip", "random_crop"],
    "mixup_cutmix": ["horizontal_flip", "random_crop"],
}
BATCH_KEYS = {"mixup": ["mixup"], "cutmix": ["cutmix"], "mixup_cutmix": ["mixup_cutmix"]}


def options():
    return sorted(path.stem for path in (CONFIGS / "aug").glob("*.yaml"))


@pytest.fixture
def composed(tmp_path):
    (tmp_path / "throwaway.yaml").write_text(
        f"defaults:\n  - aug: ???\n  - _self_\nhydra:\n  searchpath: ['file://{CONFIGS}']\n", encoding="utf-8"
    )

    def build(option, *overrides):
        with initialize_config_dir(str(tmp_path), version_base=None):
            return compose("throwaway", [f"aug={option}", *overrides]).aug

    return build


def pictures(count=7, channels=3, size=16):
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, size, size), generator=g, dtype=torch.uint8)


def everything():
    return Augmentation(
        {
            "flip": HorizontalFlip(),
            "crop": RandomCrop(2),
            "affine": Affine(20, 0.1),
            "jitter": ColorJitter(0.3, 0.3, 0.3, 0.2),
            "erase": RandomErasing(),
        }
    )


def test_there_are_nine_options():
    assert options() == sorted(SAMPLE_KEYS)
    assert len(options()) == 9


@pytest.mark.parametrize("option", options())
def test_an_option_composes_builds_and_augments_with_its_operations_in_order(composed, option):
    config = composed(option)
    augmentation = instantiate(config)
    assert list(augmentation.sample) == SAMPLE_KEYS[option]
    assert list(augmentation.batch) == BATCH_KEYS.get(option, [])
    read = round(24 * augmentation.eval_resize)
    for channels in (1, 3):
        images = pictures(channels=channels, size=read)
        result = augmentation.samples(images, np.arange(7), seed=0, epoch=0, img_size=24)
        assert result.shape == (7, channels, 24, 24)
        assert result.dtype == torch.float32
        assert float(result.min()) >= 0.0
        assert float(result.max()) <= 1.0 + 1e-6
        changed = not torch.equal(result, images.float() / 255)
        assert changed == (option != "none")
        steps = [augmentation.mix(result, torch.eye(7), seed=0, step=step, rank=0) for step in range(20)]
        assert any(mixed is not result for mixed, _ in steps) == (option in BATCH_KEYS)
        assert all(soft.shape == (7, 7) for _, soft in steps)


@pytest.mark.parametrize("option", options())
def test_an_option_begins_with_its_description(option):
    first = (CONFIGS / "aug" / f"{option}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert 10 < len(first) <= 120


def test_the_presets_hold_the_published_strengths(composed):
    standard, strong, imagenet = composed("standard").sample, composed("strong").sample, composed("imagenet")
    jitter = ("brightness", "contrast", "saturation", "hue")
    assert [standard.color_jitter[k] for k in jitter] == [0.2, 0.2, 0.2, 0.1]
    assert [strong.color_jitter[k] for k in jitter] == [0.4, 0.4, 0.4, 0.2]
    assert (standard.random_erasing.prob, list(standard.random_erasing.scale)) == (0.5, [0.02, 0.33])
    assert (strong.rotation.degrees, standard.random_crop.padding, standard.horizontal_flip.prob) == (15, 4, 0.5)
    assert (imagenet.eval_resize, list(imagenet.sample.random_resized_crop.scale)) == (1.14, [0.8, 1.0])
    assert (imagenet.sample.translate.translate, imagenet.sample.random_erasing.prob) == (0.1, 0.2)


def test_null_on_the_command_line_leaves_one_operation_out(composed):
    augmentation = instantiate(composed("standard", "aug.sample.horizontal_flip=null"))
    assert list(augmentation.sample) == ["random_crop", "color_jitter", "random_erasing"]


def test_a_samples_result_does_not_depend_on_the_batch_around_it():
    images, indices = pictures(), np.arange(100, 107)
    whole = everything().samples(images, indices, seed=1, epoch=2, img_size=16)
    order = [5, 0, 3]
    part = everything().samples(images[order], indices[order], seed=1, epoch=2, img_size=16)
    torch.testing.assert_close(part, whole[order], atol=1e-6, rtol=0)
    alone = everything().samples(images[3:4], indices[3:4], seed=1, epoch=2, img_size=16)
    torch.testing.assert_close(alone[0], whole[3], atol=1e-6, rtol=0)


def test_results_repeat_for_equal_keys_and_change_with_seed_epoch_and_index():
    images, indices = pictures(), np.arange(7)

    def run(seed=0, epoch=0, offset=0):
        return everything().samples(images, indices + offset, seed=seed, epoch=epoch, img_size=16)

    assert torch.equal(run(), run())
    for changed in (run(seed=1), run(epoch=1), run(offset=1)):
        assert not torch.equal(run(), changed)


def test_leaving_an_operation_out_keeps_the_draws_of_the_others():
    images, indices = pictures(), np.arange(7)
    alone = Augmentation({"erase": RandomErasing(prob=1.0)}).samples(images, indices, 0, 0, 16)
    behind = Augmentation({"flip": HorizontalFlip(0.0), "erase": RandomErasing(prob=1.0)})
    assert torch.equal(behind.samples(images, indices, 0, 0, 16), alone)


def test_a_second_draw_of_one_operation_gives_new_numbers():
    seen = []

    def greedy(images, draw):
        seen.extend([draw(3), draw(3)])
        return images

    Augmentation({"greedy": greedy}).samples(pictures(), np.arange(7), 0, 0, 16)
    assert not torch.equal(seen[0], seen[1])


def test_no_global_generator_is_consumed_and_pictures_are_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    images = pictures()
    before, states = images.clone(), (torch.get_rng_state(), np.random.get_state()[1].copy())
    augmentation = Augmentation({"all": ColorJitter(0.5), "erase": RandomErasing()}, {"mixup": MixUp(1.0)})
    result = augmentation.samples(images, np.arange(7), 0, 0, 16)
    augmentation.mix(result, torch.eye(7), 0, 0, 0)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])


def test_larger_pictures_are_cropped_in_the_centre_as_in_evaluation():
    images = pictures(size=20)
    result = Augmentation(eval_resize=1.25).samples(images, np.arange(7), 0, 0, 16)
    assert torch.equal(result, tv.center_crop(images, [16, 16]).float() / 255)
    evaluated = Preprocess(16, 20, 3, (0.0,) * 3, (1.0,) * 3)(images)
    assert torch.equal(result, evaluated)


def test_mixing_is_a_function_of_seed_step_and_rank():
    images, targets = torch.rand(16, 1, 4, 4), torch.eye(16)
    augmentation = Augmentation(batch={"mixup": MixUp(1.0)})
    first = augmentation.mix(images, targets, 0, 0, 0)[0]
    assert torch.equal(first, augmentation.mix(images, targets, 0, 0, 0)[0])
    for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.equal(first, augmentation.mix(images, targets, *key)[0])


def test_evaluation_cannot_reach_the_augmentation_for_no_layer_it_uses_imports_it():
    layers = [CONFIGS.parent / "cvtrain" / name for name in ("core", "data", "evaluation")]
    files = [path for layer in layers for path in layer.glob("**/*.py")]
    assert len(files) > 10
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("cvtrain.aug")], path
