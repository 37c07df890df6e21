"""Augmentation policies: each operation against torchvision's, the draws against torchvision's definitions."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta, binomtest, chisquare, kstest
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from cvtrain.aug import AugMix, AutoAugment, RandAugment, TrivialAugment
from cvtrain.aug.augmix import mix
from cvtrain.aug.policies import AUGMIX, CUBUK, WIDE
from cvtrain.aug.policy_ops import GEOMETRIC, OPERATIONS, Plan, run
from cvtrain.aug.policy_tables import POLICIES
from cvtrain.core.random import sample_uniforms
from cvtrain.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")
NEAREST, BILINEAR = v2.InterpolationMode.NEAREST, v2.InterpolationMode.BILINEAR
FACTORS = [-0.99, -0.9, -0.27, 0.0, 0.09, 0.5, 0.99]
MAGNITUDES = {
    "ShearX": [-0.99, -0.3, -0.09, 0.0, 0.11, 0.3, 0.99],
    "ShearY": [-0.99, -0.3, -0.09, 0.0, 0.11, 0.3, 0.99],
    "TranslateX": [-32.0, -7.9, -1.0, 0.0, 0.9, 4.35, 14.5],
    "TranslateY": [-32.0, -7.9, -1.0, 0.0, 0.9, 4.35, 14.5],
    "Rotate": [-135.0, -90.0, -9.0, 0.0, 4.5, 30.0, 90.0, 117.0],
    "Brightness": FACTORS,
    "Color": FACTORS,
    "Contrast": FACTORS,
    "Sharpness": FACTORS,
    "Posterize": [0.0, 1.0, 2.0, 4.0, 6.0, 7.0, 8.0],
    "Solarize": [0.33, 0.999, *np.linspace(0, 1, 31), *np.linspace(0, 1, 10)],
}


def pictures(count, channels=3, height=24, width=31, seed=0):
    """Smooth shapes with a little noise; a channel of the first is flat, the second is flat, the last pure noise."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = g.uniform(0.1, 0.6, (count, channels, 2, 1, 1))
    smooth = 127 + g.uniform(20, 140, (count, channels, 1, 1)) * np.sin(waves[:, :, 0] * x + waves[:, :, 1] * y)
    levels = np.clip(smooth + g.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
    levels[0, 0] = 77
    levels[min(1, count - 1)] = 200
    levels[-1] = g.integers(0, 256, levels[-1].shape)
    return torch.from_numpy(levels)


def draws(count, seed=0, epoch=0):
    return lambda n: sample_uniforms(seed, epoch, np.arange(count), "policy", n)


def single(name, magnitudes):
    place = OPERATIONS.index(name)
    return Plan(np.full((len(magnitudes), 1), place), np.array(magnitudes, dtype=np.float32)[:, None])


def reference(name, image, magnitude, interpolation=NEAREST):
    """What torchvision's policies do with a name and a magnitude."""
    magnitude = float(np.float32(magnitude))
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], "interpolation": interpolation}
    slope = math.degrees(math.atan(magnitude))
    return {
        "Identity": lambda: image,
        "ShearX": lambda: tv.affine(image, **{**still, "shear": [slope, 0.0]}, center=[0, 0]),
        "ShearY": lambda: tv.affine(image, **{**still, "shear": [0.0, slope]}, center=[0, 0]),
        "TranslateX": lambda: tv.affine(image, **{**still, "translate": [int(magnitude), 0]}),
        "TranslateY": lambda: tv.affine(image, **{**still, "translate": [0, int(magnitude)]}),
        "Rotate": lambda: tv.rotate(image, magnitude, interpolation=interpolation),
        "Brightness": lambda: tv.adjust_brightness(image, 1.0 + magnitude),
        "Color": lambda: tv.adjust_saturation(image, 1.0 + magnitude),
        "Contrast": lambda: tv.adjust_contrast(image, 1.0 + magnitude),
        "Sharpness": lambda: tv.adjust_sharpness(image, 1.0 + magnitude),
        "Posterize": lambda: tv.posterize(image, int(magnitude)),
        "Solarize": lambda: tv.solarize(image, 255.0 * magnitude),
        "AutoContrast": lambda: tv.autocontrast(image),
        "Equalize": lambda: tv.equalize(image),
        "Invert": lambda: tv.invert(image),
    }[name]()


def off(result, expected):
    """The difference in levels."""
    assert result.dtype == torch.uint8
    return (result.int() - expected.int()).abs()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(24, 31), (32, 32)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_equals_torchvisions_within_one_level(name, size, channels, layout):
    magnitudes = MAGNITUDES.get(name, [0.0] * 7)
    if size == (24, 31):
        # Turned by 90°, all pixels of a picture with one odd side lie half-way between two.
        magnitudes = [m for m in magnitudes if abs(m) != 90]
    images = pictures(len(magnitudes), channels, *size)
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    before = images.clone()
    result = run(images, single(name, magnitudes))
    expected = torch.stack([reference(name, image, m) for image, m in zip(images, magnitudes, strict=True)])
    if name in GEOMETRIC:
        # Where the source lies half-way between two pixels the last bit of the map decides; else nearest is exact.
        assert float((off(result, expected) > 0).float().mean()) <= 0.001
    else:
        exact = name in ("Identity", "Posterize", "Solarize", "Equalize", "Invert")
        assert int(off(result, expected).max()) <= (0 if exact else 1)
    assert result.stride() == images.stride()
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_each_bilinear_operation_equals_torchvisions_within_one_level(name):
    magnitudes = MAGNITUDES[name]
    images = pictures(len(magnitudes))
    result = run(images, single(name, magnitudes), "bilinear")
    expected = torch.stack([reference(name, i, m, BILINEAR) for i, m in zip(images, magnitudes, strict=True)])
    assert int(off(result, expected).max()) <= 1


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n not in ("Color", "Contrast")])
def test_any_number_of_channels_is_treated_channel_by_channel(name):
    magnitudes = MAGNITUDES.get(name, [0.0] * 7)
    images = pictures(len(magnitudes), channels=5)
    result = run(images, single(name, magnitudes))
    for channel in range(5):
        alone = run(images[:, channel : channel + 1], single(name, magnitudes))
        assert torch.equal(result[:, channel : channel + 1], alone)


def test_colour_leaves_five_channels_alone_and_contrast_stretches_them_about_their_common_mean():
    images = pictures(7, channels=5)
    assert torch.equal(run(images, single("Color", FACTORS)), images)
    factor = 1.0 + torch.tensor(FACTORS, dtype=torch.float64).view(-1, 1, 1, 1)
    mean = images.double().mean(dim=(1, 2, 3), keepdim=True)
    expected = (images * factor + mean * (1 - factor)).clamp(0, 255).to(torch.uint8)
    assert int(off(run(images, single("Contrast", FACTORS)), expected).max()) <= 1


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 2), (3, 3)])
def test_tiny_pictures_pass_through_every_operation(size):
    images = pictures(len(OPERATIONS), 3, *size)
    magnitudes = np.array([4 if name == "Posterize" else 0.3 for name in OPERATIONS], dtype=np.float32)
    plan = Plan(np.arange(len(OPERATIONS))[:, None], magnitudes[:, None])
    expected = torch.stack([reference(n, i, m) for n, i, m in zip(OPERATIONS, images, magnitudes, strict=True)])
    assert int(off(run(images, plan), expected).max()) <= 1


def test_operations_of_a_plan_follow_one_another_with_each_sample_its_own():
    names = [("Rotate", "Equalize", "Solarize"), ("Equalize", "Rotate", "Identity"), ("Invert", "Color", "ShearX")]
    magnitudes = [(20.0, 0.0, 0.5), (0.0, -20.0, 0.0), (0.0, 0.4, 0.2)]
    images = pictures(3)
    places = np.array([[OPERATIONS.index(name) for name in row] for row in names])
    result = run(images, Plan(places, np.array(magnitudes, dtype=np.float32)))
    expected = []
    for image, row, strengths in zip(images, names, magnitudes, strict=True):
        done = image
        for name, magnitude in zip(row, strengths, strict=True):
            done = reference(name, done, magnitude)
        expected.append(done)
    assert float((off(result, torch.stack(expected)) > 1).float().mean()) <= 0.001


POLICY_OBJECTS = [RandAugment(), TrivialAugment(), AugMix(), *(AutoAugment(name) for name in POLICIES)]
IDS = ["rand", "trivial", "augmix", *POLICIES]


@pytest.mark.parametrize("policy", POLICY_OBJECTS, ids=IDS)
@pytest.mark.parametrize(("height", "width"), [(11, 13), (40, 40)])
def test_a_result_is_a_function_of_the_sample_alone_whatever_its_batch_and_layout(policy, height, width):
    count = 130
    images = pictures(count, 3, height, width)
    whole = policy(images.contiguous(memory_format=torch.channels_last), draws(count))
    for chosen in ([129], [0, 64], list(range(70, 130))):
        rows = np.array(chosen)
        part = policy(images[rows], lambda n, rows=rows: sample_uniforms(0, 0, rows, "policy", n))
        assert torch.equal(part, whole[rows])
    assert not torch.equal(whole, policy(images, draws(count, epoch=1)))


@pytest.mark.parametrize("policy", POLICY_OBJECTS, ids=IDS)
def test_the_host_never_reads_what_is_on_the_device(policy):
    # A tensor on the meta device has no values: whatever waited for one would fail.
    result = policy(pictures(9).to("meta"), draws(9))
    assert result.shape == (9, 3, 24, 31)
    assert result.dtype == torch.uint8


@pytest.mark.parametrize(
    ("space", "theirs", "bins"),
    [
        (CUBUK, v2.RandAugment._AUGMENTATION_SPACE, 31),
        (CUBUK, v2.AutoAugment._AUGMENTATION_SPACE, 10),
        (WIDE, v2.TrivialAugmentWide._AUGMENTATION_SPACE, 31),
        (AUGMIX, v2.AugMix._AUGMENTATION_SPACE, 10),
    ],
    ids=["rand", "auto", "trivial", "augmix"],
)
@pytest.mark.parametrize("size", [(32, 32), (224, 160)])
def test_the_strengths_are_torchvisions(space, theirs, bins, size):
    table = space.magnitudes(bins, size)
    for name, (values, _) in theirs.items():
        expected = values(bins, *size)
        if expected is not None:
            assert table[OPERATIONS.index(name)].tolist() == expected.float().tolist(), name


@pytest.mark.parametrize("name", POLICIES)
def test_the_learnt_policies_are_torchvisions(name):
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy(name))._policies
    assert len(POLICIES[name]) == 25
    for ours, pair in zip(POLICIES[name], theirs, strict=True):
        assert [(n, p, s or 0) for n, p, s in pair] == list(ours)


def assert_signs(plan, space):
    """Half of the operations that torchvision signs are negative, none of the others."""
    for name, (_, signed) in space.items():
        drawn = plan.magnitudes[plan.operations == OPERATIONS.index(name)]
        drawn = drawn[drawn != 0]
        if signed and len(drawn):
            assert binomtest(int((drawn < 0).sum()), len(drawn)).pvalue > 1e-4, name
        else:
            assert not (drawn < 0).any(), name


def test_randaugment_draws_torchvisions_operations_equally_often_at_one_strength():
    plan = RandAugment(num_ops=2, magnitude=9).plan(draws(20000), (32, 32))
    space = v2.RandAugment._AUGMENTATION_SPACE
    for slot in range(2):
        counts = np.bincount(plan.operations[:, slot], minlength=len(OPERATIONS))
        assert set(np.flatnonzero(counts)) == {OPERATIONS.index(name) for name in space}
        assert chisquare(counts[counts > 0]).pvalue > 1e-4
    together = np.bincount(plan.operations[:, 0] * 15 + plan.operations[:, 1], minlength=225)
    assert chisquare(together[together > 0]).pvalue > 1e-4
    assert_signs(plan, space)
    rotations = plan.magnitudes[plan.operations == OPERATIONS.index("Rotate")]
    assert np.unique(np.abs(rotations)).tolist() == [9.0]


def test_trivialaugment_draws_one_operation_at_every_strength_equally_often():
    plan = TrivialAugment().plan(draws(40000), (32, 32))
    space = v2.TrivialAugmentWide._AUGMENTATION_SPACE
    assert plan.operations.shape == (40000, 1)
    counts = np.bincount(plan.operations[:, 0], minlength=len(OPERATIONS))
    assert set(np.flatnonzero(counts)) == {OPERATIONS.index(name) for name in space}
    assert chisquare(counts[counts > 0]).pvalue > 1e-4
    assert_signs(plan, space)
    angles = np.abs(plan.magnitudes[plan.operations == OPERATIONS.index("Rotate")])
    values, often = np.unique(angles, return_counts=True)
    assert np.allclose(values, np.linspace(0, 135, 31))
    assert chisquare(often).pvalue > 1e-4


def test_autoaugment_draws_every_pair_equally_often_and_each_step_with_its_probability():
    count = 50000
    plan = AutoAugment("cifar10").plan(draws(count), (32, 32))
    expected = np.zeros((2, len(OPERATIONS)))
    for pair in POLICIES["cifar10"]:
        for slot, (name, prob, _) in enumerate(pair):
            expected[slot, OPERATIONS.index(name)] += prob / 25
            expected[slot, 0] += (1 - prob) / 25
    for slot in range(2):
        counts = np.bincount(plan.operations[:, slot], minlength=len(OPERATIONS))
        possible = expected[slot] > 0
        assert not counts[~possible].any()
        assert chisquare(counts[possible], expected[slot][possible] * count).pvalue > 1e-4
    assert_signs(plan, v2.AutoAugment._AUGMENTATION_SPACE)
    # The only pair with Rotate of cifar10 has it at level 2 of ten.
    rotations = plan.magnitudes[plan.operations == OPERATIONS.index("Rotate")]
    assert np.allclose(np.abs(rotations), 30 * 2 / 9)


def test_augmix_draws_torchvisions_weights_lengths_operations_and_strengths():
    count = 20000
    plans, weights = AugMix(severity=3, mixture_width=3).plans(draws(count), (30, 30))
    assert np.allclose(weights.sum(axis=1), 1, atol=1e-6)
    assert kstest(weights[:, 0], "uniform").pvalue > 1e-4
    shares = weights[:, 1:] / weights[:, 1:].sum(axis=1, keepdims=True)
    for chain in range(3):
        assert kstest(shares[:, chain], beta(1, 2).cdf).pvalue > 1e-4
    space = v2.AugMix._AUGMENTATION_SPACE
    for plan in plans:
        lengths = (plan.operations != OPERATIONS.index("Identity")).sum(axis=1)
        assert chisquare(np.bincount(lengths, minlength=4)[1:]).pvalue > 1e-4
        counts = np.bincount(plan.operations.ravel(), minlength=len(OPERATIONS))[1:]
        assert {OPERATIONS[k + 1] for k in np.flatnonzero(counts)} == set(space)
        assert chisquare(counts[counts > 0]).pvalue > 1e-4
        assert_signs(plan, space)
        moves = np.abs(plan.magnitudes[plan.operations == OPERATIONS.index("TranslateX")])
        values, often = np.unique(moves, return_counts=True)
        assert np.allclose(values, [0, 10 / 9, 20 / 9])
        assert chisquare(often).pvalue > 1e-4


def test_augmix_adds_the_chains_up_with_their_weights():
    count, policy = 12, AugMix()
    images = pictures(count)
    plans, weights = policy.plans(draws(count), (24, 31))
    total = images.double() * torch.from_numpy(weights[:, 0].astype(np.float64)).view(-1, 1, 1, 1)
    for k, plan in enumerate(plans):
        for row in range(count):
            done = images[row]
            for place, magnitude in zip(plan.operations[row], plan.magnitudes[row], strict=True):
                done = reference(OPERATIONS[place], done, magnitude, BILINEAR)
            total[row] += done.double() * float(weights[row, k + 1])
    difference = off(policy(images, draws(count)), total.clamp(0, 255).to(torch.uint8))
    # A chain's Equalize or Posterize may turn one level into several.
    assert float((difference > 1).float().mean()) < 0.005


def test_a_mix_of_one_picture_is_that_picture():
    images = pictures(5)
    assert torch.equal(mix([images, images], torch.tensor([[1.0, 0.0]] * 5)), images)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: RandAugment(num_ops=0), "num_ops=0"),
        (lambda: RandAugment(magnitude=31), "magnitude=31"),
        (lambda: AutoAugment("cifar"), "did you mean 'cifar10'"),
        (lambda: AugMix(severity=11), "severity=11"),
        (lambda: AugMix(mixture_width=0), "mixture_width=0"),
    ],
)
def test_a_bad_setting_is_refused_by_name_and_value(build, text):
    with pytest.raises(ConfigError, match=text):
        build()
