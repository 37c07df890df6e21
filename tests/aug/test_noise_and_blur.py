"""Perspective, blur and greyscale against torchvision's; noise against its own definition and statistics."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from cvtrain.aug import GaussianBlur, GaussianNoise, Greyscale, Perspective, SaltAndPepper
from cvtrain.aug.blur import gaussian_blur, gaussian_weights
from cvtrain.aug.noise import hashed
from cvtrain.aug.perspective import coefficients_of, perspective
from cvtrain.core.random import sample_uniforms
from cvtrain.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(count, channels=3, height=24, width=31, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=g)


def draws(count, seed=0, epoch=0):
    return lambda n: sample_uniforms(seed, epoch, np.arange(count), "noise", n)


def off(result, expected):
    assert result.dtype == torch.uint8
    return int((result.int() - expected.int()).abs().max())


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("distortion_scale", [0.1, 0.5, 0.9])
def test_a_perspective_equals_torchvisions_within_one_level(channels, distortion_scale):
    count, (height, width) = 40, (24, 31)
    images = pictures(count, channels)
    corners = Perspective(distortion_scale, 1.0).corners(draws(count)(8), height, width)
    result = perspective(images, torch.from_numpy(coefficients_of(corners, height, width)))
    start = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
    expected = torch.stack(
        [tv.perspective(i, start, ends.astype(int).tolist()) for i, ends in zip(images, corners, strict=True)]
    )
    assert off(result, expected) <= 1


def test_the_corners_are_drawn_from_torchvisions_ranges():
    count, (height, width) = 20000, (25, 32)
    corners = Perspective(0.6, 1.0).corners(draws(count)(8), height, width)
    across, down = int(0.6 * (width // 2)) + 1, int(0.6 * (height // 2)) + 1
    # torch.randint's lower ends, inclusive, as in v2.RandomPerspective.make_params.
    low = [(0, 0), (width - across, 0), (width - across, height - down), (0, height - down)]
    for corner, (left, top) in enumerate(low):
        for axis, first, reach in ((0, left, across), (1, top, down)):
            values, often = np.unique(corners[:, corner, axis], return_counts=True)
            assert values.tolist() == list(range(first, first + reach))
            assert chisquare(often).pvalue > 1e-4


def test_corners_that_span_no_area_leave_the_picture_as_it_is():
    flat = np.array([[[0, 0], [10, 0], [20, 0], [0, 23]], [[5, 5]] * 4, [[0, 0], [30, 0], [30, 23], [0, 23]]], float)
    coefficients = coefficients_of(flat, 24, 31)
    assert np.allclose(coefficients, [1, 0, 0, 0, 1, 0, 0, 0], atol=1e-6)
    images = pictures(3)
    assert off(perspective(images, torch.from_numpy(coefficients)), images) <= 1


def test_the_largest_distortion_of_the_smallest_pictures_stays_finite():
    for side in (1, 2, 3, 4, 5, 8):
        corners = Perspective(1.0, 1.0).corners(draws(3000)(8), side, side)
        assert np.isfinite(coefficients_of(corners, side, side)).all()


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 23])
def test_a_blur_equals_torchvisions_within_one_level(channels, kernel_size):
    sigma = np.array([0.1, 0.5, 1.0, 2.0, 7.5], dtype=np.float32)
    images = pictures(len(sigma), channels)
    result = gaussian_blur(images, torch.from_numpy(gaussian_weights(kernel_size, sigma)))
    expected = torch.stack(
        [tv.gaussian_blur(i, [kernel_size] * 2, [float(s)] * 2) for i, s in zip(images, sigma, strict=True)]
    )
    assert off(result, expected) <= 1


def test_the_blur_of_a_sample_has_the_sigma_it_draws():
    count = 2000
    point = torch.zeros(count, 1, 41, 41, dtype=torch.uint8)
    point[:, :, 20, 20] = 255
    wide = GaussianBlur(3, [0.5, 1.5], prob=1.0)(point, draws(count))[:, 0, 20, 20]
    sigma = sample_uniforms(0, 0, np.arange(count), "noise", 2)[:, 1] + 0.5
    side = np.exp(-0.5 / sigma.astype(np.float64) ** 2)
    assert np.abs(wide.numpy() - 255 / (1 + 2 * side) ** 2).max() <= 0.51
    assert kstest(sigma, "uniform", args=(0.5, 1.0)).pvalue > 1e-4


@pytest.mark.parametrize("size", [3, 5])
def test_a_kernel_that_reaches_beyond_the_picture_is_refused_with_the_largest_that_fits(size):
    blur, images = GaussianBlur(2 * size + 1, prob=1.0), pictures(2, 3, size, 40)
    with pytest.raises(
        ConfigError, match=f"kernel_size={2 * size + 1} .* {size} pixels\n  allowed: up to {2 * size - 1}"
    ):
        blur(images, draws(2))
    assert GaussianBlur(2 * size - 1, prob=1.0)(images, draws(2)).shape == images.shape


def test_greyscale_equals_torchvisions_and_keeps_three_channels():
    images = pictures(6)
    expected = v2.Grayscale(3)(images)
    assert off(Greyscale(1.0)(images, draws(6)), expected) <= 1


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_greyscale_leaves_pictures_without_colour_alone(channels):
    images = pictures(6, channels)
    assert torch.equal(Greyscale(1.0)(images, draws(6)), images)


def lowbias32(value):
    """C. Wellos' mixer in Python's own integers."""
    value ^= value >> 16
    value = value * 0x7FEB352D % 2**32
    value ^= value >> 15
    value = value * 0x846CA68B % 2**32
    return value ^ value >> 16


def test_the_hash_is_two_rounds_of_lowbias32():
    keys = [(0, 0), (1, 0), (0, 1), (2**24 - 1, 12345), (7, 2**24 - 1)]
    bits = hashed(torch.tensor(keys, dtype=torch.int32), 300)
    for row, (first, second) in zip(bits.tolist(), keys, strict=True):
        assert [value % 2**32 for value in row] == [lowbias32(lowbias32(k ^ first) ^ second) for k in range(300)]


def test_gaussian_noise_is_normal_with_the_mean_and_sigma_asked_for():
    images = torch.full((20, 3, 64, 64), 100, dtype=torch.uint8)
    noisy = GaussianNoise(0.05, 0.1, prob=1.0)(images, draws(20)).double() - 100
    assert abs(float(noisy.mean()) - 0.05 * 255) < 5 * 25.5 / noisy.numel() ** 0.5
    assert abs(float(noisy.std()) - 25.5) < 0.2
    # Rounding to levels hides in a normal of this width; a cut-off tail or a coarse one does not.
    g = np.random.default_rng(0)
    smeared = noisy.flatten().numpy() + g.uniform(-0.5, 0.5, noisy.numel())
    assert kstest(smeared, "norm", args=(0.05 * 255, 25.5)).pvalue > 1e-3


def test_gaussian_noise_differs_between_samples_epochs_pixels_and_channels():
    images = torch.full((6, 3, 64, 64), 128, dtype=torch.uint8)
    noise = GaussianNoise(0.0, 0.1, prob=1.0)
    here, later = (noise(images, draws(6, epoch=epoch)).double() - 128 for epoch in (0, 1))
    rows = [*here.flatten(0, 1).flatten(1), *later.flatten(0, 1).flatten(1), here[0, 0].roll(1, 0).flatten()]
    correlation = np.corrcoef(np.stack([row.numpy() for row in rows]))
    assert np.abs(correlation - np.eye(len(rows))).max() < 5 / 64


def test_gaussian_noise_is_cut_off_at_black_and_white():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).repeat(1, 3, 40, 40)
    dark, light = GaussianNoise(0.0, 0.3, prob=1.0)(images, draws(2)).double()
    assert 0.45 < float((dark == 0).double().mean()) < 0.55
    assert 0.45 < float((light == 255).double().mean()) < 0.55


@pytest.mark.parametrize("amount", [0.0, 0.05, 0.4, 1.0])
def test_salt_and_pepper_change_the_share_asked_for_half_white_all_channels_at_once(amount):
    images = torch.full((10, 3, 64, 64), 100, dtype=torch.uint8)
    spotted = SaltAndPepper(amount, prob=1.0)(images, draws(10))
    assert torch.equal(spotted[:, 0], spotted[:, 1])
    assert torch.equal(spotted[:, 0], spotted[:, 2])
    white, black = ((spotted[:, 0] == level).double().mean().item() for level in (255, 0))
    tolerance = 4 * (amount / 2 / spotted[:, 0].numel()) ** 0.5
    assert abs(white - amount / 2) <= tolerance
    assert abs(black - amount / 2) <= tolerance
    assert set(spotted.unique().tolist()) <= {0, 100, 255}


OPERATIONS = [
    Perspective(0.5, 0.5),
    GaussianBlur(5, [0.1, 2.0], 0.5),
    Greyscale(0.5),
    GaussianNoise(0.0, 0.1, 0.5),
    SaltAndPepper(0.2, 0.5),
]
IDS = [type(operation).__name__ for operation in OPERATIONS]


@pytest.mark.parametrize("operation", OPERATIONS, ids=IDS)
def test_prob_is_the_share_of_pictures_that_are_changed(operation):
    count = 3000
    images = pictures(count, 3, 12, 12)
    changed = (operation(images, draws(count)) != images).flatten(1).any(dim=1).double().mean()
    assert abs(float(changed) - 0.5) < 4 * 0.5 / count**0.5


@pytest.mark.parametrize("operation", OPERATIONS, ids=IDS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_result_is_a_function_of_the_sample_alone_whatever_its_batch_and_layout(operation, channels):
    count = 130
    images = pictures(count, channels, 37, 23)
    before = images.clone()
    whole = operation(images.contiguous(memory_format=torch.channels_last), draws(count))
    assert whole.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(operation(images, draws(count)), whole)
    for chosen in ([129], [0, 64], list(range(70, 130))):
        rows = np.array(chosen)
        part = operation(images[rows], lambda n, rows=rows: sample_uniforms(0, 0, rows, "noise", n))
        assert torch.equal(part, whole[rows])
    assert torch.equal(images, before)


@pytest.mark.parametrize("operation", OPERATIONS, ids=IDS)
def test_the_host_never_reads_what_is_on_the_device(operation):
    # A tensor on the meta device has no values: whatever waited for one would fail.
    assert operation(pictures(9).to("meta"), draws(9)).shape == (9, 3, 24, 31)


@pytest.mark.parametrize("kind", [Perspective, GaussianBlur, Greyscale, GaussianNoise, SaltAndPepper])
def test_pictures_that_share_their_memory_are_treated_one_by_one(kind):
    shared = pictures(1).expand(40, -1, -1, -1)
    assert torch.equal(kind(prob=0.5)(shared, draws(40)), kind(prob=0.5)(shared.clone(), draws(40)))


@pytest.mark.parametrize("kind", [Perspective, GaussianBlur, Greyscale, GaussianNoise, SaltAndPepper])
def test_nothing_happens_when_no_sample_is_chosen(kind):
    images = pictures(5)
    assert torch.equal(kind(prob=0.0)(images, draws(5)), images)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Perspective(distortion_scale=1.5), "distortion_scale=1.5"),
        (lambda: GaussianBlur(kernel_size=4), "kernel_size=4"),
        (lambda: GaussianBlur(sigma=[0.0, 1.0]), "sigma="),
        (lambda: Greyscale(prob=2), "prob=2"),
        (lambda: GaussianNoise(noise_sigma=-1), "noise_sigma=-1"),
        (lambda: GaussianNoise(noise_mean=2), "noise_mean=2"),
        (lambda: SaltAndPepper(amount=1.1), "amount=1.1"),
    ],
)
def test_a_bad_setting_is_refused_by_name_and_value(build, text):
    with pytest.raises(ConfigError, match=text):
        build()
