"""The pipeline, and every option of configs/aug."""

import ast
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torchvision.transforms.v2 import functional as tv

from cvtrain.aug import (
    Affine,
    Augmentation,
    ColorJitter,
    HorizontalFlip,
    MixUp,
    RandomCrop,
    RandomErasing,
    RandomResizedCrop,
)
from cvtrain.core.random import sample_uniforms
from cvtrain.core.types import Preprocess

CONFIGS = Path(__file__).parents[2] / "configs"

# SPEC's presets and mixes; policies have their tests beside them.
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
    images = torch.randint(256, (count, channels, size, size), generator=g, dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last)


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


def photographs():
    return Augmentation({"cut": RandomResizedCrop((0.3, 1.0)), **everything().sample}, eval_resize=1.5)


def test_the_presets_are_among_the_options():
    assert set(SAMPLE_KEYS) <= set(options())
    assert len(SAMPLE_KEYS) == 9


@pytest.mark.parametrize("option", SAMPLE_KEYS)
def test_a_preset_composes_builds_and_augments_with_its_operations_in_order(composed, option):
    config = composed(option)
    augmentation = instantiate(config)
    assert list(augmentation.sample) == SAMPLE_KEYS[option]
    assert list(augmentation.batch) == BATCH_KEYS.get(option, [])
    read = round(24 * augmentation.eval_resize)
    for channels in (1, 3):
        images = pictures(channels=channels, size=read)
        result = augmentation.samples(images.clone(), np.arange(7), seed=0, epoch=0, img_size=24)
        assert result.shape == (7, channels, 24, 24)
        assert result.dtype == torch.uint8
        assert channels != 3 or result.is_contiguous(memory_format=torch.channels_last)
        changed = not torch.equal(result, images)
        assert changed == (option != "none")
        result = result.float() / 255
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


@pytest.mark.parametrize("build", [everything, photographs])
@pytest.mark.parametrize("size", [12, 16, 33])
def test_a_samples_result_is_to_the_bit_the_same_in_any_batch(build, size):
    images, indices = pictures(count=150, size=round(size * build().eval_resize)), np.arange(100, 250)
    whole = build().samples(images.clone(), indices, seed=1, epoch=2, img_size=size)
    order = np.random.default_rng(0).permutation(150)
    shuffled = build().samples(images[order], indices[order], seed=1, epoch=2, img_size=size)
    assert torch.equal(shuffled, whole[order])
    for position in (0, 77, 149):
        one = slice(position, position + 1)
        alone = build().samples(images[one].clone(), indices[one], seed=1, epoch=2, img_size=size)
        assert torch.equal(alone[0], whole[position])


@pytest.mark.parametrize("build", [everything, photographs])
@pytest.mark.parametrize("pixels", [1, 3 * 24 * 24, 2**20])
def test_neither_the_chunks_nor_the_threads_change_a_result(build, pixels, monkeypatch, one_thread):
    images, indices = pictures(count=40, size=24), np.arange(40)
    expected = build().samples(images.clone(), indices, seed=0, epoch=0, img_size=16)
    monkeypatch.setattr("cvtrain.aug.ranges.CACHED_PIXELS", pixels)
    torch.set_num_threads(2)
    assert torch.equal(build().samples(images.clone(), indices, seed=0, epoch=0, img_size=16), expected)


def test_pictures_on_the_cpu_are_augmented_on_one_thread_and_the_threads_are_given_back(one_thread):
    seen = []

    def broken(images, draw):
        seen.append(torch.get_num_threads())
        raise RuntimeError("broken")

    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="broken"):
        Augmentation({"broken": broken}).samples(pictures(), np.arange(7), 0, 0, 16)
    assert (seen, torch.get_num_threads()) == ([1], 2)


def test_results_repeat_for_equal_keys_and_change_with_seed_epoch_and_index():
    images, indices = pictures(), np.arange(7)

    def run(seed=0, epoch=0, offset=0):
        return everything().samples(images.clone(), indices + offset, seed=seed, epoch=epoch, img_size=16)

    assert torch.equal(run(), run())
    for changed in (run(seed=1), run(epoch=1), run(offset=1)):
        assert not torch.equal(run(), changed)


def test_the_result_is_that_of_the_operations_one_after_the_other():
    images, indices = pictures(), np.arange(7)
    expected = images.clone()
    for key, op in everything().sample.items():
        expected = Augmentation({key: op}).samples(expected, indices, 0, 0, 16)
    assert torch.equal(everything().samples(images, indices, 0, 0, 16), expected)


def test_a_crop_taken_while_reading_is_the_one_the_batch_would_get_and_is_left_out_then():
    images, indices = pictures(size=24), np.arange(50, 57)
    chooser = pickle.loads(pickle.dumps(photographs().crop))
    read = [
        tv.resized_crop(image, *box, [16, 16], antialias=True)
        for image, box in zip(images, chooser.boxes(chooser.draw(3, 4, indices), (24, 24)), strict=True)
    ]
    expected = photographs().samples(images, indices, seed=3, epoch=4, img_size=16)
    result = photographs().samples(torch.stack(read), indices, seed=3, epoch=4, img_size=16, cropped=True)
    assert torch.equal(result, expected)


def test_the_crop_taken_while_reading_draws_its_box_from_the_pictures_own_size():
    chooser = Augmentation({"cut": RandomResizedCrop((0.2, 0.2), (1.0, 1.0))}).crop
    boxes = chooser.boxes(chooser.draw(0, 0, np.arange(50)), (100, 500))
    assert {box[2:] for box in boxes} == {(100, 100)}
    assert {box[0] for box in boxes} == {0}
    assert len({box[1] for box in boxes}) > 30


@pytest.mark.parametrize("sample", [{}, {"flip": HorizontalFlip(), "cut": RandomResizedCrop()}, {"crop": RandomCrop()}])
def test_no_crop_is_offered_to_the_reader_when_something_else_comes_first(sample):
    assert Augmentation(sample).crop is None


def test_a_crop_left_out_on_the_command_line_is_not_offered_either():
    assert Augmentation({"cut": None, "flip": HorizontalFlip()}).crop is None
    assert Augmentation({"flip": None, "cut": RandomResizedCrop()}).crop is not None


def test_adapt_reaches_the_operations_that_ask_for_it():
    augmentation = Augmentation({"flip": HorizontalFlip(), "erase": RandomErasing(prob=1.0)})
    augmentation.adapt(Preprocess(16, 16, 3, (1.0, 0.0, 0.2), (1.0,) * 3))
    result = augmentation.samples(torch.full((1, 3, 16, 16), 7, dtype=torch.uint8), np.arange(1), 0, 0, 16)
    assert [channel.unique().tolist() for channel in result[0]] == [[7, 255], [0, 7], [7, 51]]


def test_leaving_an_operation_out_keeps_the_draws_of_the_others():
    images, indices = pictures(), np.arange(7)
    alone = Augmentation({"erase": RandomErasing(prob=1.0)}).samples(images.clone(), indices, 0, 0, 16)
    behind = Augmentation({"flip": HorizontalFlip(0.0), "erase": RandomErasing(prob=1.0)})
    assert torch.equal(behind.samples(images, indices, 0, 0, 16), alone)


def test_a_second_draw_of_one_operation_gives_new_numbers():
    seen = []

    def greedy(images, draw):
        seen.extend([draw(3), draw(3)])
        return images

    Augmentation({"greedy": greedy}).samples(pictures(), np.arange(7), 0, 0, 16)
    assert not np.array_equal(seen[0], seen[1])


@pytest.mark.parametrize("last", [0, 1, 4095, 4096, 65_535, 10**12])
@pytest.mark.parametrize("count", [1, 32])
def test_an_operation_draws_each_samples_own_numbers_in_small_and_in_large_sets(last, count):
    indices, seen = np.array([last, 0, last // 2]), []

    def noting(images, draw):
        seen.append(draw(count))
        seen[-1] += 1  # what an operation does to its numbers is seen by no later batch
        return images

    for epoch in (0, 0, 3):
        Augmentation({"key": noting}).samples(pictures(3), indices, 5, epoch, 16)
        assert np.array_equal(seen[-1], sample_uniforms(5, epoch, indices, "aug.key", count) + 1)


def test_no_global_generator_is_consumed():
    torch.manual_seed(0)
    np.random.seed(0)
    states = (torch.get_rng_state(), np.random.get_state()[1].copy())
    augmentation = Augmentation({"all": ColorJitter(0.5), "erase": RandomErasing()}, {"mixup": MixUp(1.0)})
    result = augmentation.samples(pictures(), np.arange(7), 0, 0, 16)
    augmentation.mix(result / 255, torch.eye(7), 0, 0, 0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])


def test_larger_pictures_are_cropped_in_the_centre_as_in_evaluation():
    images = pictures(size=20)
    result = Augmentation(eval_resize=1.25).samples(images, np.arange(7), 0, 0, 16)
    assert torch.equal(result, tv.center_crop(images, [16, 16]))
    preprocess = Preprocess(16, 20, 3, (0.0,) * 3, (1.0,) * 3)
    torch.testing.assert_close(preprocess(images), result / 255)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("option", options())
def test_on_a_gpu_an_option_never_synchronises_and_gives_the_cpus_pictures(composed, option, channels):
    augmentation = instantiate(composed(option))
    augmentation.adapt(Preprocess(32, 32, channels, (0.4,) * channels, (0.2,) * channels))
    count, size = 300, round(32 * augmentation.eval_resize)
    images, indices = pictures(count, channels, size), np.arange(count)
    on_gpu, targets = images.cuda(), torch.eye(count, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = augmentation.samples(on_gpu, indices, 0, 0, 32)
        augmentation.mix(result / 255, targets, 0, 0, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert channels != 3 or result.is_contiguous(memory_format=torch.channels_last)
    difference = (result.cpu().int() - augmentation.samples(images, indices, 0, 0, 32).int()).abs().float()
    # A rounding that falls the other way may be stretched by what follows, for a policy as far as to the other end.
    assert float(difference.mean()) < 0.2
    assert float((difference > 2).float().mean()) < 1e-2
