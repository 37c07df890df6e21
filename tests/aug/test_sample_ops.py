"""Sample operations against torchvision's for equal parameters, and the distribution of what they draw."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from cvtrain.aug import Affine, ColorJitter, HorizontalFlip, RandomCrop, RandomErasing, RandomResizedCrop, VerticalFlip
from cvtrain.aug.boxes import DRAWS, Boxes, random_boxes
from cvtrain.aug.erasing import erase, erase_batched
from cvtrain.aug.geometric import (
    affine,
    flip,
    flip_batched,
    resized_crop,
    resized_crop_batched,
    shifted_crop,
    shifted_crop_batched,
)
from cvtrain.aug.jitter import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation
from cvtrain.core.random import sample_uniforms
from cvtrain.core.types import Preprocess
from cvtrain.errors import ConfigError

LAYOUTS = {
    "channels_last": lambda images: images.contiguous(memory_format=torch.channels_last),
    "contiguous": lambda images: images.contiguous(),
    "window": lambda images: torch.nn.functional.pad(images, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
}
"""The same pictures with other strides."""


def pictures(count=6, channels=3, height=13, width=17, seed=0, layout="channels_last"):
    g = torch.Generator().manual_seed(seed)
    return LAYOUTS[layout](torch.randint(256, (count, channels, height, width), generator=g, dtype=torch.uint8))


def draws(count, seed=0, stream="test"):
    """A `draw` for `count` samples."""
    return lambda n: sample_uniforms(seed, 0, np.arange(count), stream, n)


def each(images, function, *parameters):
    return torch.stack([function(image, *(p[i] for p in parameters)) for i, image in enumerate(images)])


def off(result, expected):
    """The largest difference in levels."""
    assert result.dtype == torch.uint8
    return float((result.double() - expected.double()).abs().max())


def floats(*values):
    return np.array(values, dtype=np.float32)


def boxes(top, left, height, width):
    return Boxes(*(np.array(part) for part in (top, left, height, width)))


BOXES = boxes([0, 2, 5, 0, 12, 1], [0, 3, 9, 1, 0, 4], [13, 8, 8, 5, 1, 11], [17, 9, 8, 16, 1, 13])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("function", [flip, flip_batched])
@pytest.mark.parametrize(("dim", "reference"), [(-1, tv.horizontal_flip), (-2, tv.vertical_flip)])
def test_a_flip_equals_torchvisions_on_the_chosen_samples_only(dim, reference, function, channels, layout):
    images, chosen = pictures(channels=channels, layout=layout), np.array([True, False, True, True, False, False])
    expected = each(images, lambda image, c: reference(image) if c else image, chosen)
    assert torch.equal(function(images, chosen, dim), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("function", [shifted_crop, shifted_crop_batched])
def test_a_shifted_crop_equals_torchvisions_pad_and_crop(function, channels, layout):
    images = pictures(channels=channels, layout=layout)
    top, left = np.array([0, 1, 8, 4, 3, 7]), np.array([8, 0, 0, 4, 5, 2])
    expected = each(images, lambda image, t, x: tv.crop(tv.pad(image, [4]), int(t), int(x), 13, 17), top, left)
    assert torch.equal(function(images, top, left, 4), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_an_affine_map_equals_torchvisions_in_float_but_for_the_rounding(channels, layout):
    images = pictures(channels=channels, layout=layout)
    degrees = floats(0, 15, -30, 90, 5.5, -170)
    x, y = floats(0, 2, -3, 0.5, 1.25, 0), floats(0, -1, 0.7, 2, 0, 4)
    scale = floats(1, 0.8, 1.3, 1, 0.5, 1.1)
    expected = each(
        images.float(),
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
    assert off(affine(images, degrees, (x, y), scale), expected) < 0.51


def test_an_affine_map_without_movement_changes_nothing():
    images = pictures(height=60, width=90)
    before = images.clone()
    assert torch.equal(Affine()(images, draws(6)), before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [4, 8, 13, 24])
@pytest.mark.parametrize(("function", "tolerance"), [(resized_crop, 1.01), (resized_crop_batched, 0.51)])
def test_a_resized_crop_equals_torchvisions_in_float_within_a_level(function, tolerance, size, channels, layout):
    images = pictures(channels=channels, layout=layout)
    expected = each(
        images.float(),
        lambda image, *box: tv.resized_crop(image, *box, [size, size], antialias=True),
        *map(list, BOXES),
    )
    assert off(function(images, BOXES, size), expected) <= tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("ours", "reference", "values"),
    [
        (adjust_brightness, tv.adjust_brightness, [0.0, 0.5, 1.0, 1.4, 2.0, 0.9]),
        (adjust_contrast, tv.adjust_contrast, [0.0, 0.5, 1.0, 1.4, 2.0, 0.9]),
        (adjust_saturation, tv.adjust_saturation, [0.0, 0.5, 1.0, 1.4, 2.0, 0.9]),
        (adjust_hue, tv.adjust_hue, [0.0, 0.5, -0.5, 0.1, -0.2, 0.33]),
    ],
)
def test_each_jitter_operation_equals_torchvisions_within_a_level(ours, reference, values, layout):
    images = pictures(layout=layout)
    # Grey, black, white, pure colours and pairs of equal channels are the special cases of hue.
    special = [[128, 0, 255, 255, 0, 0, 255, 0, 255, 90, 30, 30], [128, 0, 255, 0, 255, 0, 255, 255, 0, 90, 90, 30]]
    special.append([128, 0, 255, 0, 0, 255, 0, 255, 255, 30, 90, 90])
    images[:, :, 0, :12] = torch.tensor(special, dtype=torch.uint8)
    expected = each(images, lambda image, f: reference(image, float(f)), values)
    assert off(ours(images, floats(*values)), expected) <= 1


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_a_jitter_factor_that_does_nothing_changes_no_pixel(name):
    images, neutral = pictures(height=64, width=64), floats(*[0.0 if name == "hue" else 1.0] * 6)
    before = images.clone()
    ours = {"brightness": adjust_brightness, "contrast": adjust_contrast, "saturation": adjust_saturation}
    assert torch.equal(ours.get(name, adjust_hue)(images, neutral), before)


def test_jitter_is_its_four_operations_in_their_order_but_for_the_rounding():
    count = 50
    images = pictures(count)
    strengths = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.15}
    expected = images.clone()
    for name, strength in strengths.items():
        expected = ColorJitter(**{name: strength})(expected, draws(count))
    difference = ColorJitter(**strengths)(images, draws(count)).int() - expected.int()
    # Each rounding on the way may be stretched by the steps that follow.
    assert int(difference.abs().max()) <= 3
    assert float(difference.abs().float().mean()) < 0.5


@pytest.mark.parametrize("channels", [1, 5])
def test_jitter_leaves_saturation_and_hue_of_pictures_without_colour_alone(channels):
    images = pictures(channels=channels)
    before = images.clone()
    assert torch.equal(ColorJitter(saturation=0.9, hue=0.5)(images, draws(6)), before)
    assert not torch.equal(ColorJitter(brightness=0.9)(images, draws(6)), before)


def test_contrast_of_a_grey_picture_equals_torchvisions_within_a_level():
    images, factors = pictures(channels=1), [0.0, 0.5, 1.0, 1.4, 2.0, 0.9]
    expected = each(images, tv.adjust_contrast, factors)
    assert off(adjust_contrast(images, floats(*factors)), expected) <= 1


def test_jitter_draws_each_factor_uniformly_from_its_range(monkeypatch):
    seen = {}

    def record(images, steps):
        seen.update((function.__name__, values) for function, values in steps)
        return images

    monkeypatch.setattr("cvtrain.aug.jitter.adjust", record)
    ColorJitter(0.4, 0.3, 1.2, 0.1)(pictures(4000, height=1, width=1), draws(4000))
    for key, low, width in (("_brightness", 0.6, 0.8), ("_contrast", 0.7, 0.6), ("_saturation", 0.0, 2.2)):
        assert kstest(seen[key], "uniform", args=(low, width)).pvalue > 0.001, key
    # On a circle of six, cyan - opposite red - lies at 1 and moves against the turn.
    assert kstest((1.0 - seen["_hue"][:, 0]) / 6.0, "uniform", args=(-0.1, 0.2)).pvalue > 0.001


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("function", [erase, erase_batched])
def test_erasing_fills_exactly_torchvisions_region_of_the_chosen_samples(function, channels, layout):
    images, chosen = pictures(channels=channels, layout=layout), np.array([True, True, False, True, True, False])
    colour = np.array([10, 120, 240][:channels], dtype=np.uint8)
    value = torch.from_numpy(colour).view(-1, 1, 1)
    expected = each(
        images, lambda image, c, *box: tv.erase(image, *box, value) if c else image, chosen, *map(list, BOXES)
    )
    assert torch.equal(function(images, chosen, BOXES, colour), expected)


def test_erasing_paints_the_boxes_it_draws_in_mid_grey_until_it_knows_the_data():
    images, draw = pictures(), draws(6)
    before = images.clone()
    drawn = random_boxes(draw(1 + DRAWS)[:, 1:], (13, 17), (0.02, 0.33), (0.3, 3.3))
    expected = erase_batched(before, np.full(6, True), drawn, np.array([128], dtype=np.uint8))
    assert torch.equal(RandomErasing(prob=1.0)(images, draw), expected)


@pytest.mark.parametrize(("value", "painted"), [(None, [125, 10, 255]), (0.2, [51, 51, 51])])
def test_erasing_paints_the_datas_mean_colour_unless_a_value_is_given(value, painted):
    op = RandomErasing(prob=1.0, scale=(0.3, 0.3), ratio=(1.0, 1.0), value=value)
    op.adapt(Preprocess(16, 16, 3, mean=(0.49, 0.04, 1.0), std=(0.2, 0.2, 0.2)))
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert [channel.unique().tolist() for channel in op(images, draws(1))[0]] == [[0, level] for level in painted]


def test_random_boxes_have_the_asked_area_and_ratio_and_lie_inside():
    count = 5000
    top, left, height, width = random_boxes(draws(count)(DRAWS), (200, 300), (0.1, 0.3), (0.5, 2.0))
    area = height * width / (200 * 300)
    assert kstest(area, "uniform", args=(0.1, 0.2)).pvalue > 0.001
    assert kstest(np.log2(width / height), "uniform", args=(-1, 2)).pvalue > 0.001
    assert ((top >= 0) & (left >= 0) & (top + height <= 200) & (left + width <= 300)).all()
    assert top.min() == 0
    assert (left + width).max() == 300


def test_a_box_that_can_never_fit_is_cut_down_to_the_picture():
    top, left, height, width = random_boxes(draws(50)(DRAWS), (4, 100), (1.0, 1.0), (1.0, 1.0))
    assert set(height) == {4}
    assert set(width) == {20}
    assert set(top) == {0}
    assert (left + width).max() <= 100


def test_a_box_of_less_than_a_pixel_becomes_one_pixel():
    box = random_boxes(draws(20)(DRAWS), (8, 8), (0.0, 0.0), (1.0, 1.0))
    assert set(box.height) == set(box.width) == {1}


def test_the_box_of_a_sample_does_not_depend_on_the_others():
    uniforms = draws(300)(DRAWS)
    whole = random_boxes(uniforms, (200, 300), (0.1, 1.0), (0.5, 2.0)).each()
    alone = [random_boxes(row[None], (200, 300), (0.1, 1.0), (0.5, 2.0)).each()[0] for row in uniforms]
    assert whole == alone


@pytest.mark.parametrize("op", [HorizontalFlip(0.3), VerticalFlip(0.3), RandomErasing(prob=0.3)])
def test_prob_is_the_share_of_pictures_that_are_changed(op):
    count = 5000
    images = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8).repeat(count, 1, 1, 1)
    before = images.clone()
    changed = (op(images, draws(count)) != before).flatten(1).any(dim=1).float().mean()
    assert abs(float(changed) - 0.3) < 0.02  # three standard errors


def test_random_crop_draws_every_shift_equally_often():
    count = 8100
    images = torch.zeros(count, 1, 9, 9, dtype=torch.uint8)
    images[:, 0, 4, 4] = 1
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
    Affine(degrees=10, translate=0.1, scale=[0.9, 1.1])(torch.zeros(4000, 1, 8, 20, dtype=torch.uint8), draws(4000))
    for key, low, width in (("degrees", -10, 20), ("x", -2, 4), ("y", -0.8, 1.6), ("scale", 0.9, 0.2)):
        assert kstest(seen[key], "uniform", args=(low, width)).pvalue > 0.001, key


OPERATIONS = [
    HorizontalFlip(),
    VerticalFlip(),
    RandomCrop(2),
    RandomResizedCrop((0.3, 1.0)),
    Affine(20, 0.2, (0.7, 1.4)),
    ColorJitter(0.8, 0.8, 0.8, 0.5),
    RandomErasing(),
]


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_every_operation_gives_the_same_uint8_pictures_for_any_strides(op, channels):
    results = []
    for layout in LAYOUTS:
        images = pictures(channels=channels, height=12, width=12, layout=layout)
        before = images.clone()
        results.append(op(images, draws(6)))
        assert results[-1].shape == before.shape
        assert results[-1].dtype == torch.uint8
        assert not torch.equal(results[-1], before)
        assert torch.equal(results[-1], results[0])
    assert channels != 3 or results[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: HorizontalFlip(prob=1.5), "prob=1.5"),
        (lambda: RandomErasing(scale=(0.3, 0.1)), "scale=[0.3, 0.1]"),
        (lambda: RandomErasing(value=1.5), "value=1.5"),
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
