"""Sample operations against torchvision's for equal parameters, and the distribution of what they draw."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from cvtrain.aug import Affine, ColorJitter, HorizontalFlip, RandomCrop, RandomErasing, RandomResizedCrop, VerticalFlip
from cvtrain.aug.boxes import DRAWS, random_boxes
from cvtrain.aug.erasing import inside
from cvtrain.aug.geometric import affine, flip, resized_crop, shifted_crop
from cvtrain.aug.jitter import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation
from cvtrain.core.random import sample_uniforms
from cvtrain.errors import ConfigError


def pictures(count=6, channels=3, height=13, width=17, seed=0):
    return torch.rand((count, channels, height, width), generator=torch.Generator().manual_seed(seed))


def draws(count, seed=0, stream="test"):
    """A `draw` for `count` samples."""
    return lambda n: torch.from_numpy(sample_uniforms(seed, 0, np.arange(count), stream, n))


def each(images, function, *parameters):
    return torch.stack([function(image, *(p[i] for p in parameters)) for i, image in enumerate(images)])


@pytest.mark.parametrize(("dim", "reference"), [(-1, tv.horizontal_flip), (-2, tv.vertical_flip)])
def test_a_flip_equals_torchvisions_on_the_chosen_samples_only(dim, reference):
    images, chosen = pictures(), torch.tensor([True, False, True, True, False, False])
    expected = each(images, lambda image, c: reference(image) if c else image, chosen)
    assert torch.equal(flip(images, chosen, dim), expected)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_shifted_crop_equals_torchvisions_pad_and_crop(channels):
    images = pictures(channels=channels)
    top, left = torch.tensor([0, 1, 8, 4, 3, 7]), torch.tensor([8, 0, 0, 4, 5, 2])
    expected = each(images, lambda image, t, x: tv.crop(tv.pad(image, [4]), int(t), int(x), 13, 17), top, left)
    assert torch.equal(shifted_crop(images, top, left, 4), expected)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_an_affine_map_equals_torchvisions(channels):
    images = pictures(channels=channels)
    degrees = torch.tensor([0.0, 15.0, -30.0, 90.0, 5.5, -170.0])
    x, y = torch.tensor([0.0, 2.0, -3.0, 0.5, 1.25, 0.0]), torch.tensor([0.0, -1.0, 0.7, 2.0, 0.0, 4.0])
    scale = torch.tensor([1.0, 0.8, 1.3, 1.0, 0.5, 1.1])
    expected = each(
        images,
        lambda image, d, a, b, s: tv.affine(
            image,
            angle=float(d),
            translate=[float(a), float(b)],
            scale=float(s),
            shear=[0.0, 0.0],
            interpolation=v2.InterpolationMode.BILINEAR,
        ),
        degrees,
        x,
        y,
        scale,
    )
    torch.testing.assert_close(affine(images, degrees, (x, y), scale), expected, atol=2e-5, rtol=0)


def test_an_affine_map_without_movement_changes_nothing():
    images = pictures()
    torch.testing.assert_close(Affine()(images, draws(6)), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [8, 13, 24])
def test_a_resized_crop_equals_torchvisions_without_antialiasing(size):
    images = pictures()
    box = tuple(
        torch.tensor(v) for v in ([0, 2, 5, 0, 12, 1], [0, 3, 9, 1, 0, 4], [13, 8, 8, 5, 1, 11], [17, 9, 8, 16, 1, 13])
    )
    expected = each(
        images,
        lambda image, t, x, h, w: tv.resized_crop(image, int(t), int(x), int(h), int(w), [size, size], antialias=False),
        *box,
    )
    torch.testing.assert_close(resized_crop(images, box, size), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("ours", "reference", "values"),
    [
        (adjust_brightness, tv.adjust_brightness, [0.0, 0.5, 1.0, 1.4, 2.0, 0.9]),
        (adjust_contrast, tv.adjust_contrast, [0.0, 0.5, 1.0, 1.4, 2.0, 0.9]),
        (adjust_saturation, tv.adjust_saturation, [0.0, 0.5, 1.0, 1.4, 2.0, 0.9]),
        (adjust_hue, tv.adjust_hue, [0.0, 0.5, -0.5, 0.1, -0.2, 0.33]),
    ],
)
def test_each_jitter_operation_equals_torchvisions(ours, reference, values):
    images = pictures()
    # Grey, black, white and pure colours are the special cases of hue.
    images[:, :, 0, :5] = torch.tensor([[0.5, 0, 1, 1, 0], [0.5, 0, 1, 0, 0], [0.5, 0, 1, 0, 1]])
    factors = torch.tensor(values)
    expected = each(images, lambda image, f: reference(image, float(f)), factors)
    torch.testing.assert_close(ours(images, factors), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("channels", [1, 5])
def test_jitter_leaves_saturation_and_hue_of_pictures_without_colour_alone(channels):
    images = pictures(channels=channels)
    assert torch.equal(ColorJitter(saturation=0.9, hue=0.5)(images, draws(6)), images)
    assert not torch.equal(ColorJitter(brightness=0.9)(images, draws(6)), images)


def test_contrast_of_a_grey_picture_equals_torchvisions():
    images, factors = pictures(channels=1), torch.tensor([0.0, 0.5, 1.0, 1.4, 2.0, 0.9])
    expected = each(images, lambda image, f: tv.adjust_contrast(image, float(f)), factors)
    torch.testing.assert_close(adjust_contrast(images, factors), expected, atol=2e-6, rtol=0)


def test_jitter_draws_each_factor_uniformly_from_its_range():
    count = 4000
    grey = torch.full((count, 1, 2, 2), 0.25)
    factors = ColorJitter(brightness=0.4)(grey, draws(count))[:, 0, 0, 0] / 0.25
    assert kstest(factors.numpy(), "uniform", args=(0.6, 0.8)).pvalue > 0.001


def test_erasing_fills_exactly_torchvisions_region():
    images = pictures()
    draw = draws(6)
    erased = RandomErasing(prob=1.0, value=0.5)(images, draw)
    top, left, height, width = random_boxes(draw(1 + DRAWS)[:, 1:], (13, 17), (0.02, 0.33), (0.3, 3.3))
    expected = each(
        images,
        lambda image, t, x, h, w: tv.erase(image, int(t), int(x), int(h), int(w), torch.tensor([[[0.5]]])),
        top,
        left,
        height,
        width,
    )
    assert torch.equal(erased, expected)


def test_random_boxes_have_the_asked_area_and_ratio_and_lie_inside():
    count = 5000
    top, left, height, width = random_boxes(draws(count)(DRAWS), (200, 300), (0.1, 0.3), (0.5, 2.0))
    area = height * width / (200 * 300)
    assert kstest(area.numpy(), "uniform", args=(0.1, 0.2)).pvalue > 0.001
    assert kstest((width / height).log2().numpy(), "uniform", args=(-1, 2)).pvalue > 0.001
    assert bool(((top >= 0) & (left >= 0) & (top + height <= 200) & (left + width <= 300)).all())
    assert int(top.min()) == 0
    assert int((left + width).max()) == 300


def test_a_box_that_can_never_fit_is_cut_down_to_the_picture():
    top, left, height, width = random_boxes(draws(50)(DRAWS), (4, 100), (1.0, 1.0), (1.0, 1.0))
    assert height.unique().tolist() == [4]
    assert width.unique().tolist() == [20]
    assert top.unique().tolist() == [0]
    assert int((left + width).max()) <= 100


def test_a_box_of_less_than_a_pixel_becomes_one_pixel():
    box = random_boxes(draws(20)(DRAWS), (8, 8), (0.0, 0.0), (1.0, 1.0))
    assert inside(box, (8, 8)).sum(dim=(1, 2, 3)).tolist() == [1] * 20


@pytest.mark.parametrize("op", [HorizontalFlip(0.3), VerticalFlip(0.3), RandomErasing(prob=0.3)])
def test_prob_is_the_share_of_pictures_that_are_changed(op):
    count = 5000
    images = torch.linspace(0, 0.4, 64).reshape(1, 1, 8, 8).expand(count, 1, 8, 8)
    changed = (op(images, draws(count)) != images).flatten(1).any(dim=1).float().mean()
    assert abs(float(changed) - 0.3) < 0.02  # three standard errors


def test_random_crop_draws_every_shift_equally_often():
    count = 8100
    images = torch.zeros(count, 1, 9, 9)
    images[:, 0, 4, 4] = 1.0
    places = RandomCrop(padding=4)(images, draws(count)).flatten(1).argmax(dim=1)
    frequencies = torch.bincount(places, minlength=81)
    assert int((frequencies > 0).sum()) == 81
    # Chi-squared of 80 degrees of freedom: 0.999 quantile 124.8.
    assert float(((frequencies - 100.0) ** 2 / 100.0).sum()) < 124.8


def test_affine_draws_rotation_shift_and_scale_from_their_ranges(monkeypatch):
    seen = {}

    def record(images, degrees, shift, scale):
        seen.update(degrees=degrees, x=shift[0], y=shift[1], scale=scale)
        return images

    monkeypatch.setattr("cvtrain.aug.geometric.affine", record)
    Affine(degrees=10, translate=0.1, scale=[0.9, 1.1])(torch.zeros(4000, 1, 8, 20), draws(4000))
    for key, low, width in (("degrees", -10, 20), ("x", -2, 4), ("y", -0.8, 1.6), ("scale", 0.9, 0.2)):
        assert kstest(seen[key].numpy(), "uniform", args=(low, width)).pvalue > 0.001, key


@pytest.mark.parametrize(
    "op",
    [
        HorizontalFlip(),
        VerticalFlip(),
        RandomCrop(2),
        RandomResizedCrop((0.3, 1.0)),
        Affine(20, 0.2, (0.7, 1.4)),
        ColorJitter(0.8, 0.8, 0.8, 0.5),
        RandomErasing(),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_every_operation_keeps_shape_type_and_range_and_leaves_its_input_alone(op, channels):
    images = pictures(channels=channels, height=12, width=12)
    before = images.clone()
    result = op(images, draws(6))
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert float(result.min()) >= 0.0
    assert float(result.max()) <= 1.0 + 1e-6
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: HorizontalFlip(prob=1.5), "prob=1.5"),
        (lambda: RandomErasing(scale=(0.3, 0.1)), "scale=[0.3, 0.1]"),
        (lambda: ColorJitter(hue=0.7), "hue=0.7"),
        (lambda: Affine(degrees=float("nan")), "degrees=nan"),
        (lambda: RandomResizedCrop(scale=(0.1,)), "scale=[0.1]"),
    ],
)
def test_an_argument_out_of_range_is_refused_by_name_value_and_range(build, text):
    with pytest.raises(ConfigError) as error:
        build()
    assert text in str(error.value)
    assert "allowed" in str(error.value)
