"""Duplicates: every planted copy is found, distinct pictures are left alone, and memory does not grow with N²."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from near_pictures import COPIES, photographs
from PIL import Image
from sklearn.datasets import load_digits

from cvtrain.core.types import DataSets, Preprocess
from cvtrain.data import ArraySource
from cvtrain.inspection.alignment import residuals
from cvtrain.inspection.duplicates import descriptors, near_pairs, nearest, search
from cvtrain.inspection.views import look, shown, thumbnail

pytestmark = pytest.mark.usefixtures("one_thread")


def small(images):
    """What `look` keeps of pictures: grey and colour thumbnails, sizes."""
    grey, colour, sizes = [], [], []
    for image in images:
        how = Image.Resampling.BILINEAR if min(image.size) < 32 else Image.Resampling.BOX
        little = image.resize((32, 32), how)
        grey.append(np.asarray(little.convert("L")))
        colour.append(np.asarray(little.convert("RGB").resize((4, 4), Image.Resampling.BOX)))
        sizes.append(image.size)
    return np.stack(grey), np.stack(colour), np.array(sizes, np.int32)


@pytest.fixture(scope="module")
def photos():
    return photographs()


def test_distinct_photographs_are_not_called_duplicates(photos):
    assert len(photos) > 100
    assert len(near_pairs(*small(photos))) <= 1


@pytest.mark.parametrize("kind", COPIES)
def test_planted_copies_of_photographs_are_found(photos, kind):
    rng = np.random.default_rng(0)
    copies = [COPIES[kind](image, rng) for image in photos[:60]]
    pairs = {(a, b) for a, b, _ in near_pairs(*small([*photos, *copies]))}
    planted = {(i, len(photos) + i) for i in range(len(copies))}
    least = 0.9 if kind in ("jpeg30", "crop5_jpeg60_smaller") else 0.96
    assert len(pairs & planted) >= least * len(planted)
    assert len(pairs - planted) <= 2


def test_digits_that_many_resemble_are_told_apart_but_their_copies_found():
    images = [Image.fromarray((16 * a).clip(0, 255).astype(np.uint8)) for a in load_digits().images]
    assert len(near_pairs(*small(images))) <= 5
    copies = [COPIES["jpeg95"](image, None) for image in images[:100]]
    pairs = {(a, b) for a, b, _ in near_pairs(*small([*images, *copies]))}
    assert len(pairs & {(i, len(images) + i) for i in range(100)}) >= 95


def test_a_picture_in_other_colours_is_another_picture(photos):
    red, blue = (Image.merge("RGB", [photos[0].convert("L").point(lambda v, k=k: v * k) for k in mix])
                 for mix in ((1, 0.2, 0.2), (0.2, 0.2, 1)))  # fmt: skip
    pairs = near_pairs(*small([red, blue, *photos[1:40]]))
    assert (0, 1) not in {(a, b) for a, b, _ in pairs}


def test_a_shift_and_a_stretch_are_undone_and_noise_is_not_explained(photos):
    grey = torch.from_numpy(small(photos)[0]).float()
    moved = [image.crop((4, 2, image.width - 1, image.height - 3)) for image in photos]
    assert residuals(grey, torch.from_numpy(small(moved)[0]).float()).median() < 0.02
    assert residuals(grey, 0.7 * grey + 20).abs().max() < 1e-4
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, grey.shape)).float()
    assert residuals(grey, noise).min() > 0.5


def test_the_nearest_are_those_of_a_full_comparison():
    vectors = descriptors(np.random.default_rng(0).integers(0, 256, (700, 32, 32), dtype=np.uint8))
    found, cosines = nearest(vectors, 4)
    full = vectors @ vectors.T
    np.fill_diagonal(full, -2)
    np.testing.assert_array_equal(np.sort(found, 1), np.sort(np.argsort(-full, 1)[:, :4], 1))
    np.testing.assert_allclose(np.sort(cosines, 1), np.sort(np.sort(full, 1)[:, -4:], 1), rtol=1e-5, atol=1e-6)


def sets_of(pixels, labels=None, val=2, test=2):
    """A data set of arrays `(N, C, S, S)`: the last are test, those before val."""
    count = len(pixels)
    labels = np.zeros(count, np.int64) if labels is None else np.asarray(labels)
    cuts = {"train": (0, count - val - test), "val": (count - val - test, count - test), "test": (count - test, count)}
    sources = {
        split: ArraySource(torch.from_numpy(pixels[a:b]), labels[a:b], [str(i) for i in range(a, b)])
        for split, (a, b) in cuts.items()
    }
    channels, side = pixels.shape[1:3]
    preprocess = Preprocess(side, side, channels, (0.5,) * channels, (0.5,) * channels)
    return DataSets("made", ["a", "b"], preprocess, **sources)


def test_the_same_pixels_are_grouped_and_uniform_pictures_only_when_equal():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 3, 16, 16), dtype=np.uint8)
    pixels[19] = pixels[3]
    for row, level in ((5, 10), (6, 11), (7, 12), (8, 12)):
        pixels[row] = level
    found = search(look(sets_of(pixels), 0))
    assert [(group.kind, group.rows) for group in found.groups] == [("pixels", (3, 19)), ("pixels", (7, 8))]
    assert found.flat == 4


def test_a_set_of_nothing_but_copies_is_still_seen_through(photos):
    images = [image for image in photos[:30] for image in (image, COPIES["jpeg60"](image, None))]
    pairs = {(a, b) for a, b, _ in near_pairs(*small(images))}
    assert len(pairs & {(i, i + 1) for i in range(0, 60, 2)}) >= 28
    many = [COPIES[kind](photos[0], np.random.default_rng(1)) for kind in COPIES]
    groups = near_pairs(*small([*many, *photos[1:100]]))
    assert len({a for a, b, _ in groups if b < len(many)} | {b for a, b, _ in groups if b < len(many)}) >= 8


def test_small_copies_in_a_group_larger_than_the_candidates_are_found(photos):
    little = [image.resize((40, 40), Image.Resampling.BOX) for image in photos[:120]]
    copies = [COPIES["jpeg30"](little[2].point(lambda v, k=k: max(0, v - k)), None) for k in range(1, 9)]
    pairs = near_pairs(*small([*little, *copies]))
    assert {row for a, b, _ in pairs for row in (a, b)} == {2, *range(120, 128)}


def test_pictures_of_next_to_nothing_are_not_copies_of_each_other():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 1, 32, 32), dtype=np.uint8)
    for row in range(8):
        pixels[row] = 100 + row + np.arange(32, dtype=np.uint8)[None, None, :] // 4
    found = search(look(sets_of(pixels), 0))
    assert found.groups == []
    assert found.flat == 8


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_tiny_sets_are_searched_too(photos, count):
    if count == 0:
        assert near_pairs(np.empty((0, 32, 32), np.uint8), np.empty((0, 4, 4, 3), np.uint8), np.empty((0, 2))) == []
        return
    images = [photos[0], COPIES["jpeg95"](photos[0], None), photos[1]][:count]
    assert [(a, b) for a, b, _ in near_pairs(*small(images))] == ([(0, 1)] if count > 1 else [])


def test_thumbnails_show_the_picture_of_their_row():
    pixels = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.full((1, 1, 4, 4), 30, np.uint8)
    sets = sets_of(pixels)
    views = look(sets, 0)
    for row in range(8):
        image = thumbnail(sets, views, row, 112)
        assert image.size == (112, 112)
        assert image.getextrema() == (30 * row, 30 * row)
    assert shown(np.zeros((300, 300, 3), np.uint8), 112).size == (112, 112)


SEARCH_20000 = """
import resource, numpy as np, torch
from cvtrain.inspection.duplicates import descriptors, nearest
torch.set_num_threads(1)
vectors = descriptors(np.random.default_rng(0).integers(0, 256, (20_000, 32, 32), dtype=np.uint8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nearest(vectors[:2000], 4)
found, _ = nearest(vectors, 4)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_memory_of_the_search_grows_with_n_and_not_its_square():
    answer = subprocess.run(
        [sys.executable, "-c", SEARCH_20000], capture_output=True, text=True, timeout=300, check=True
    )
    # A full table of 20,000² numbers would take 1.6 GB.
    assert int(answer.stdout) < 300
