"""Preprocess and Batch."""

import json

import numpy as np
import pytest
import torch

from cvtrain.core.types import Batch, Preprocess

RGB = Preprocess(6, 8, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_preprocess_survives_json():
    again = Preprocess.from_dict(json.loads(json.dumps(RGB.to_dict())))
    assert again == RGB
    assert isinstance(again.mean, tuple)


def test_its_json_says_what_another_program_needs():
    values = RGB.to_dict()
    assert values == {
        "img_size": 6, "resize": 8, "channels": 3, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        "interpolation": "bilinear", "scale": 255.0, "layout": "NCHW",
    }  # fmt: skip


@pytest.mark.parametrize(("resize", "img_size"), [(8, 6), (8, 8), (9, 6), (8, 5)])
def test_pictures_are_cropped_scaled_and_normalised_as_the_formula_says(resize, img_size):
    preprocess = Preprocess(img_size, resize, 3, RGB.mean, RGB.std)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, resize, resize), dtype=np.uint8)
    first = (resize - img_size) // 2
    cropped = pixels[:, :, first : first + img_size, first : first + img_size]
    expected = (cropped / 255.0 - np.reshape(RGB.mean, (3, 1, 1))) / np.reshape(RGB.std, (3, 1, 1))
    given = torch.from_numpy(pixels)
    by_rows = preprocess(given.contiguous(memory_format=torch.channels_last))
    assert by_rows.is_contiguous(memory_format=torch.channels_last) or resize != img_size
    np.testing.assert_allclose(by_rows.numpy(), expected, atol=1e-6)
    result = preprocess(given)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)
    assert torch.equal(given, torch.from_numpy(pixels))


@pytest.mark.parametrize("shape", [(0, 3, 6, 6), (1, 3, 2, 100_000), (3, 3, 300, 301), (130, 3, 32, 32)])
def test_batches_of_any_length_are_normalised_whole(shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (RGB.mean, RGB.std))
    result = RGB.normalize(images)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(result.double(), (images.double() / 255 - mean) / std, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 5])
def test_any_number_of_channels_is_normalised_by_its_own_mean_and_std(channels):
    mean, std = tuple(i / 10 for i in range(channels)), tuple(1.0 + i for i in range(channels))
    images = torch.full((2, channels, 4, 4), 51, dtype=torch.uint8)
    result = Preprocess(4, 4, channels, mean, std).normalize(images)
    for c in range(channels):
        assert torch.allclose(result[:, c], torch.tensor((0.2 - mean[c]) / std[c]))


def test_moving_a_batch_moves_its_tensors_and_leaves_the_indices_on_the_host():
    batch = Batch(torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([1, 0]), np.array([4, 9]))
    moved = batch.to(torch.device("meta"))
    assert (moved.images.device.type, moved.targets.device.type) == ("meta", "meta")
    assert moved.indices is batch.indices
    assert len(moved) == 2
