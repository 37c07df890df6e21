import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from cvtrain.aug.views import VIEWS, answer_views, views
from cvtrain.errors import ConfigError

EXPECTED = {
    "identity": lambda images: images,
    "hflip": F.horizontal_flip,
    "vflip": F.vertical_flip,
    "hvflip": lambda images: F.vertical_flip(F.horizontal_flip(images)),
    "rotate+5": lambda images: F.rotate(images, 5, F.InterpolationMode.BILINEAR),
    "rotate-5": lambda images: F.rotate(images, -5, F.InterpolationMode.BILINEAR),
    "brighter": lambda images: F.adjust_brightness(images, 1.1),
    "darker": lambda images: F.adjust_brightness(images, 0.9),
    "contrast+": lambda images: F.adjust_contrast(images, 1.1),
    "contrast-": lambda images: F.adjust_contrast(images, 0.9),
}
"""The functional operations of torchvision."""


def pictures(channels=3, memory=torch.contiguous_format):
    levels = np.random.default_rng(0).integers(0, 256, (3, channels, 12, 17), dtype=np.uint8)
    return torch.from_numpy(levels).contiguous(memory_format=memory)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_every_view_is_the_operation_of_torchvision_and_leaves_the_pictures_alone(memory):
    images, before = pictures(memory=memory), pictures()
    chosen = views(["flip", "rotate", "color"], channels=3)
    assert list(chosen) == list(EXPECTED)
    for name, view in chosen.items():
        seen = view(images)
        assert (seen.shape, seen.dtype) == (images.shape, torch.uint8)
        off = (seen.int() - EXPECTED[name](before).int()).abs()
        assert int(off.max()) <= (0 if "flip" in name or name == "identity" else 1), name
        assert name == "identity" or not torch.equal(seen, before)
        assert torch.equal(images, before)


def test_pictures_of_one_channel_have_no_colour():
    assert list(views(["hflip", "color"], channels=1)) == ["identity", "hflip"]
    with pytest.raises(ConfigError, match=r"tta=\[color\] changes no picture of 1 channel; try flip or rotate"):
        views(["color"], channels=1)


def test_a_view_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ConfigError, match=r"tta=rotat: did you mean 'rotate'\? choices: hflip, flip, rotate, color"):
        views(["flip", "rotat"], channels=3)
    assert {name for family in VIEWS.values() for name in family} == set(EXPECTED) - {"identity"}


def test_the_answer_is_the_mean_over_the_views():
    images, weight = pictures(), torch.from_numpy(np.random.default_rng(1).normal(size=(3 * 12 * 17, 4))).float() / 500

    def answer(view):
        return torch.softmax(view(images).flatten(1).float() @ weight, dim=1)

    chosen = views(["flip", "rotate"], channels=3)
    mean = answer_views(answer, chosen)
    each = np.stack([answer(view).double().numpy() for view in chosen.values()])
    np.testing.assert_allclose(mean.numpy(), each.mean(0), rtol=1e-12)
    assert np.ptp(each, axis=0).max() > 0.01
