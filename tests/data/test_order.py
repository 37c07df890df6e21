"""Splits, folds, limits and the order of an epoch, held against counts and against each other."""

import numpy as np
import pytest

from cvtrain.data.order import WINDOW_SHARDS, balanced, by_shard, shuffled
from cvtrain.data.splits import fold_of, limited, stratified
from cvtrain.errors import ConfigError, DataError

LABELS = np.repeat(np.arange(4), [50, 30, 15, 5])


def test_the_folds_hold_every_position_once_and_every_class_evenly():
    tested = []
    for fold in range(5):
        rest, inside = fold_of(LABELS, 5, fold, seed=3)
        assert sorted([*rest, *inside]) == list(range(100))
        assert np.bincount(LABELS[inside]).tolist() == [10, 6, 3, 1]
        tested += inside.tolist()
    assert sorted(tested) == list(range(100))


def test_folds_differ_by_one_picture_at_most_when_classes_do_not_divide():
    labels = np.repeat(np.arange(7), 11)
    sizes = [len(fold_of(labels, 4, fold, seed=0)[1]) for fold in range(4)]
    assert max(sizes) - min(sizes) <= 1


def test_folds_follow_their_seed_and_more_folds_than_pictures_are_refused():
    assert fold_of(LABELS, 5, 0, 1)[1].tolist() == fold_of(LABELS, 5, 0, 1)[1].tolist()
    assert fold_of(LABELS, 5, 0, 1)[1].tolist() != fold_of(LABELS, 5, 0, 2)[1].tolist()
    with pytest.raises(DataError, match="only 3 pictures"):
        fold_of(np.array([0, 1, 0]), 5, 0, 0)


@pytest.mark.parametrize("limit", [4, 10, 37, 99])
def test_a_limit_keeps_every_class_and_its_share(limit):
    chosen = limited(LABELS, limit, seed=0)
    counts = np.bincount(LABELS[chosen], minlength=4)
    assert len(set(chosen.tolist())) == limit
    assert counts.min() >= 1
    exact = np.array([0.50, 0.30, 0.15, 0.05]) * limit
    assert (np.abs(counts - exact) <= 2).all()


def test_a_limit_of_100_on_ten_equal_classes_is_ten_of_each():
    labels = np.arange(1000) % 10
    assert np.bincount(labels[limited(labels, 100, 0)]).tolist() == [10] * 10


def test_a_smaller_limit_is_part_of_a_larger_one_where_classes_are_equal():
    labels = np.arange(1000) % 10
    assert set(limited(labels, 50, 0)) < set(limited(labels, 200, 0))


def test_a_limit_above_the_set_keeps_all_and_one_below_the_classes_is_refused():
    assert limited(LABELS, 1000, 0).tolist() == list(range(100))
    with pytest.raises(ConfigError, match="below the 4 classes"):
        limited(LABELS, 3, 0)


@pytest.mark.parametrize(("count", "width"), [(1000, 20), (300, 6), (120, 12)])
def test_splits_of_pictures_with_several_labels_have_their_shares_and_every_labels_frequency(count, width):
    """Almost every combination of labels occurs once."""
    labels = (np.random.default_rng(0).random((count, width)) < np.linspace(0.05, 0.4, width)).astype(np.uint8)
    parts = stratified(labels, (0.1, 0.2), seed=0)
    assert sorted(np.concatenate(parts)) == list(range(count))
    for part, share in zip(parts, (0.7, 0.1, 0.2), strict=True):
        assert len(part) == pytest.approx(share * count, abs=width)
    few = limited(labels, count // 3, seed=0)
    assert len(few) == count // 3
    for part in (parts[0], few):
        assert np.abs(labels[part].mean(0) - labels.mean(0)).max() < 1.2 / np.sqrt(len(part))
    folds = [fold_of(labels, 5, fold, seed=0)[1] for fold in range(5)]
    assert max(map(len, folds)) - min(map(len, folds)) <= 1


def test_balanced_epochs_draw_every_class_equally_often_and_reach_every_picture():
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    epochs = [balanced(labels, 5, epoch) for epoch in range(12)]
    for order in epochs:
        counts = np.bincount(labels[order])
        assert len(order) == 1000
        assert counts.max() - counts.min() <= 1
    drawn = np.bincount(np.concatenate(epochs), minlength=1000)
    for number in range(3):
        members = drawn[labels == number]
        assert members.min() >= 1
        assert members.max() - members.min() <= 1, "within a class no picture again before all others"
    assert epochs[0].tolist() == balanced(labels, 5, 0).tolist()
    assert epochs[0].tolist() != epochs[1].tolist()


def test_an_order_is_a_permutation_of_its_own_a_seed_and_epoch():
    assert sorted(shuffled(50, 0, 0)) == list(range(50))
    assert len({tuple(shuffled(50, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_shards_are_visited_window_by_window_and_mixed_within():
    groups = np.repeat(np.arange(12), 20)
    order = by_shard(groups, 0, 0)
    assert sorted(order) == list(range(240))
    size = WINDOW_SHARDS * 20
    windows = [groups[order[i : i + size]] for i in range(0, 240, size)]
    for window in windows:
        assert np.unique(window, return_counts=True)[1].tolist() == [20] * WINDOW_SHARDS
        assert (np.diff(window) != 0).mean() > 0.5, "neighbours come from several shards"
    assert by_shard(groups, 0, 0).tolist() != by_shard(groups, 0, 1).tolist()
