"""Batches: order, last batch, ranks, both kinds of loader, and workers that die."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from cvtrain.core.types import DataSets, Preprocess
from cvtrain.data import ArraySource, Digits, Loader, LoaderConfig
from cvtrain.errors import ConfigError, DataError, WorkerError

CPU = torch.device("cpu")


def numbered(count):
    """Pictures whose pixels spell their position."""
    images = torch.arange(count).view(-1, 1, 1, 1).expand(count, 1, 2, 2).to(torch.uint8).contiguous()
    return ArraySource(images, np.arange(count, dtype=np.int64) % 2, [str(i) for i in range(count)])


class Wrapped:
    """A source that is not an array; `before` runs in the reading process."""

    def __init__(self, source, before=lambda indices: None):
        self.source, self.labels, self.names, self.before = source, source.labels, source.names, before

    def __len__(self):
        return len(self.source)

    def read(self, indices):
        self.before(indices)
        return self.source.read(indices)


def sets(train=20, val=7, test=5, wrap=lambda source: source):
    parts = [wrap(numbered(count)) for count in (train, val, test)]
    return DataSets("numbered", ["a", "b"], Preprocess(2, 2, 1, (0.5,), (0.5,)), *parts)


def loader(data=None, **changes):
    values = {"batch_size": 6, "seed": 0, "device": CPU, **changes}
    return Loader(data or sets(), LoaderConfig(**values))


def flat(parts):
    return [index for part in parts for index in part]


def indices(batches):
    return [batch.indices.tolist() for batch in batches]


@pytest.mark.parametrize(("mode", "workers"), [("device", 0), ("host", 0), ("host", 2)])
def test_a_batch_holds_the_pictures_and_labels_of_its_indices(mode, workers):
    for batch in loader(mode=mode, workers=workers).train_batches(0):
        assert batch.images.dtype == torch.uint8
        assert batch.targets.dtype == torch.int64
        assert batch.indices.dtype == np.int64
        assert batch.images[:, 0, 0, 0].tolist() == batch.indices.tolist()
        assert batch.targets.tolist() == (batch.indices % 2).tolist()


def test_every_kind_of_loader_and_number_of_workers_gives_the_same_batches():
    expected = indices(loader(mode="device").train_batches(3))
    for workers in (0, 1, 2):
        assert indices(loader(mode="host", workers=workers).train_batches(3)) == expected


def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own():
    first, second = indices(loader().train_batches(0)), indices(loader().train_batches(1))
    assert [len(batch) for batch in first] == [6, 6, 6, 2]
    assert sorted(flat(first)) == list(range(20))
    assert flat(first) != flat(second)
    assert flat(first) != list(range(20))
    assert indices(loader(seed=1).train_batches(0)) != first
    assert indices(loader().train_batches(0)) == first


@pytest.mark.parametrize(("mode", "workers"), [("device", 0), ("host", 0), ("host", 2)])
@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_an_epoch_resumed_at_any_step_goes_on_with_the_very_same_batches(mode, workers, start):
    made = loader(mode=mode, workers=workers)
    assert indices(made.train_batches(2, start)) == indices(made.train_batches(2))[start:]


@pytest.mark.parametrize(
    ("count", "steps", "last"), [(18, 3, 6), (19, 3, 6), (20, 4, 2), (23, 4, 5), (2, 1, 2), (5, 1, 5)]
)
def test_the_last_batch_is_kept_from_two_samples_on(count, steps, last):
    made = loader(sets(train=count))
    batches = indices(made.train_batches(0))
    assert made.steps_per_epoch == len(batches) == steps
    assert len(batches[-1]) == last


def test_no_training_batch_at_all_stops_with_the_arithmetic():
    with pytest.raises(DataError, match=r"1 pictures on 1 process\(es\) leave each 1 of batch_size=6"):
        loader(sets(train=1))
    with pytest.raises(DataError, match=r"3 pictures on 2 process\(es\) leave each 1"):
        loader(sets(train=3), world_size=2)


@pytest.mark.parametrize("count", [20, 21, 22, 23, 24])
def test_ranks_share_each_global_batch_without_overlap_and_as_equally_as_it_divides(count):
    data = sets(train=count)
    alone = indices(loader(data, batch_size=6).train_batches(0))
    shares = [indices(loader(data, batch_size=6, rank=r, world_size=3).train_batches(0)) for r in range(3)]
    steps = {len(share) for share in shares}
    assert steps == {loader(data, batch_size=6, world_size=3).steps_per_epoch}
    for step in range(steps.pop()):
        sizes = {len(share[step]) for share in shares}
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 2
        assert flat(share[step] for share in shares) == list(alone[step])
        assert loader(data, batch_size=6, rank=1, world_size=3).batch_total(step) == len(alone[step])


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_evaluation_sees_every_sample_once_over_all_ranks_and_in_order(world_size, split):
    data = sets()
    seen = []
    for rank in range(world_size):
        made = loader(data, batch_size=24, rank=rank, world_size=world_size)
        seen += flat(indices(made.eval_batches(split, batch_size=2)))
    assert seen == list(range(len(getattr(data, split))))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_limited_evaluation_sees_the_same_samples_whoever_shares_it(world_size):
    data, seen = sets(), []
    for rank in range(world_size):
        seen += flat(indices(loader(data, batch_size=6, rank=rank, world_size=world_size).eval_batches("val", limit=1)))
    assert seen == list(range(6))


@pytest.mark.parametrize(("mode", "workers"), [("device", 0), ("host", 0), ("host", 2)])
def test_evaluation_gives_the_sources_own_pixels_at_every_pass(mode, workers):
    data = Digits().load(None, 1.0, 0)
    made = loader(data, mode=mode, workers=workers, batch_size=64)
    for _ in range(2):
        images = torch.cat([batch.images for batch in made.eval_batches("val")])
        assert torch.equal(images, data.val.read(np.arange(len(data.val))))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_consumes_no_global_generator(workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(mode="host", workers=workers).train_batches(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_auto_takes_the_device_for_arrays_and_the_host_for_files_and_says_why():
    assert (loader().mode, "in memory or its cache already" in loader().reason) == ("device", True)
    files = loader(sets(wrap=Wrapped), workers=0)
    assert (files.mode, "as they are needed" in files.reason) == ("host", True)
    assert loader(mode="host").mode == "host"


def test_auto_keeps_a_set_that_is_too_large_off_an_accelerator(monkeypatch):
    monkeypatch.setattr("cvtrain.data.loader.DEVICE_LIMIT", 100)
    made = loader(device=torch.device("meta"))
    assert made.mode == "host"
    assert "exceed" in made.reason


def test_the_device_for_files_is_refused_with_the_fix():
    with pytest.raises(DataError, match=r"data\.cache=disk.*data\.cache_mb"):
        loader(sets(wrap=Wrapped), mode="device")


def test_a_split_that_is_not_an_array_is_read_on_the_host_even_in_device_mode():
    data = sets()
    mixed = DataSets(data.name, data.class_names, data.preprocess, data.train, Wrapped(data.val), data.test)
    made = loader(mixed)
    assert made.mode == "device"
    assert flat(indices(made.eval_batches("val"))) == list(range(7))


def fail_at_13(where):
    if 13 in where:
        raise DataError("/pictures/13.jpg: broken")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_becomes_unreadable_is_one_line_with_its_path(workers):
    made = loader(sets(wrap=lambda source: Wrapped(source, fail_at_13)), workers=workers)
    with pytest.raises(DataError) as error:
        list(made.train_batches(0))
    assert str(error.value) == "/pictures/13.jpg: broken"


def die_at_13(where):
    if 13 in where:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_a_worker_error():
    made = loader(sets(wrap=lambda source: Wrapped(source, die_at_13)), workers=2)
    with pytest.raises(WorkerError, match="a data worker died") as error:
        list(made.train_batches(0))
    assert error.value.exit_code == 8
    assert "workers" in str(error.value)


def shout_at_13(where):
    if 13 in where:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


def test_workers_survive_the_signals_that_ask_the_main_process_to_stop():
    made = loader(sets(wrap=lambda source: Wrapped(source, shout_at_13)), workers=2)
    assert sorted(flat(indices(made.train_batches(0)))) == list(range(20))


def test_an_epoch_that_is_broken_off_leaves_no_worker_behind():
    before = set(multiprocessing.active_children())
    batches = loader(mode="host", workers=2).train_batches(0)
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    assert not set(multiprocessing.active_children()) - before


def broken(_):
    raise RuntimeError("a bug")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_in_a_source_is_not_mistaken_for_a_dead_worker(workers):
    made = loader(sets(wrap=lambda source: Wrapped(source, broken)), workers=workers)
    with pytest.raises(RuntimeError, match="a bug"):
        list(made.train_batches(0))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch_size": 1}, "batch_size=1"),
        ({"batch_size": 6, "world_size": 4}, "a multiple of 4"),
        ({"mode": "gpu"}, "allowed: auto, device, host"),
        ({"workers": -1}, "workers=-1"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes, text):
    with pytest.raises(ConfigError, match=text):
        loader(**changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("mode", "workers"), [("device", 0), ("host", 2)])
def test_batches_arrive_on_the_gpu(mode, workers):
    for batch in loader(device=torch.device("cuda"), mode=mode, workers=workers).train_batches(0):
        assert batch.images.is_cuda
        assert batch.targets.is_cuda
        assert batch.images[:, 0, 0, 0].tolist() == batch.indices.tolist()
