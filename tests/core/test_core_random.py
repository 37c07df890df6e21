"""Counter-based randomness: pure, uniform, independent, and frozen."""

import random

import numpy as np
import pytest
import torch
from scipy import stats

from cvtrain.core.random import generator, sample_uniforms, step_seed

MANY = np.arange(20_000, dtype=np.int64)


def column(seed=0, epoch=0, stream="flip", indices=MANY):
    return sample_uniforms(seed, epoch, indices, stream, 1)[:, 0]


@pytest.mark.parametrize("where", [(0, 0, "flip"), (1, 0, "flip"), (0, 7, "crop"), (2**40, 3, "erase")])
def test_the_numbers_are_uniform_on_the_half_open_unit_interval(where):
    drawn = sample_uniforms(where[0], where[1], MANY, where[2], 5)
    assert drawn.shape == (20_000, 5)
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    for numbers in drawn.T:
        assert stats.kstest(numbers, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"epoch": 1},
        {"stream": "flip.1"},
        {"stream": "crop"},
        {"indices": MANY + 1},
        {"indices": MANY + 20_000},
    ],
)
def test_neighbouring_seeds_epochs_streams_and_indices_are_independent(other):
    x, y = column(), column(**other)
    assert abs(np.corrcoef(x, y)[0, 1]) < 4 / np.sqrt(len(x))
    table, _, _ = np.histogram2d(x, y, bins=8, range=[[0, 1], [0, 1]])
    assert stats.chisquare(table.ravel()).pvalue > 1e-3


def test_the_numbers_of_one_sample_are_independent_of_each_other():
    drawn = sample_uniforms(0, 0, MANY, "jitter", 6)
    correlations = np.corrcoef(drawn.T)[np.triu_indices(6, 1)]
    assert np.abs(correlations).max() < 4 / np.sqrt(len(MANY))


def test_a_sample_draws_the_same_numbers_in_every_batch():
    alone = [sample_uniforms(3, 2, np.array([i]), "crop", 4)[0] for i in (5, 99, 7)]
    together = sample_uniforms(3, 2, np.array([5, 99, 7]), "crop", 4)
    shuffled = sample_uniforms(3, 2, np.array([7, 0, 5, 1, 99, 2]), "crop", 4)
    np.testing.assert_array_equal(np.stack(alone), together)
    np.testing.assert_array_equal(shuffled[[2, 4, 0]], together)


def test_asking_for_more_numbers_leaves_the_first_ones_as_they_were():
    np.testing.assert_array_equal(sample_uniforms(0, 0, MANY, "a", 5)[:, :2], sample_uniforms(0, 0, MANY, "a", 2))


def test_the_numbers_are_the_frozen_ones():
    assert sample_uniforms(0, 0, np.arange(3), "flip", 2).tolist() == [
        [0.7377551198005676, 0.9203975200653076],
        [0.10053104162216187, 0.7523884177207947],
        [0.4903873801231384, 0.7270680069923401],
    ]
    assert sample_uniforms(7, 3, np.array([12345]), "crop", 3).tolist() == [
        [0.8261158466339111, 0.24696308374404907, 0.1864437460899353]
    ]
    assert generator(0, "order", 0).permutation(10).tolist() == [0, 1, 6, 5, 7, 2, 3, 9, 4, 8]
    assert generator("a", 1).random(2).tolist() == [0.2541175242346775, 0.49219011574128024]
    assert (step_seed(0, 0, 0), step_seed(3, 141, 1)) == (1545113521757963777, 5303815777320306191)


def test_no_global_generator_is_read_or_moved():
    np.random.seed(1)
    random.seed(1)
    torch.manual_seed(1)
    before = (np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist())
    first = (column()[:5].tolist(), generator(4, "x").random(3).tolist(), step_seed(1, 2, 3))
    after = (np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist())
    assert before == after
    np.random.seed(2)
    torch.manual_seed(2)
    assert (column()[:5].tolist(), generator(4, "x").random(3).tolist(), step_seed(1, 2, 3)) == first


def test_a_generator_depends_on_every_part_of_its_key_and_on_their_order():
    keys = [
        (0, "mix", 1, 0),
        (1, "mix", 1, 0),
        (0, "order", 1, 0),
        (0, "mix", 2, 0),
        (0, "mix", 1, 1),
        (1, "mix", 0, 0),
    ]
    assert len({generator(*key).integers(2**63) for key in keys}) == len(keys)


def test_step_seeds_are_63_bits_and_never_repeat_over_a_long_run():
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(500) for rank in range(2)}
    assert len(seeds) == 3_000
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    assert max(seeds) > 2**62
