"""Batches of a split: from a tensor on the device, or from worker processes.

The order of an epoch is a pure function of (seed, epoch), so that a resume in mid-epoch starts at any step at no
cost, and neither the kind of loader, nor the number of workers or ranks changes which samples a global batch holds.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cvtrain.core.types import Batch, CropChooser, DataSets, Source
from cvtrain.data.order import balanced, by_shard, shuffled
from cvtrain.data.shared_memory import workers_that_fit
from cvtrain.data.source import ArraySource, EncodedSource
from cvtrain.errors import ConfigError, CvtrainError, DataError, WorkerError

Indices = NDArray[np.int64]
_Read = Tensor | CvtrainError

DEVICE_LIMIT = 2 << 30
"""Bytes of a data set up to which `auto` keeps it on an accelerator."""

WORKER_TIMEOUT = 300.0
"""Seconds without a batch after which the workers count as hung, on a dead network drive for instance."""


@dataclass(frozen=True)
class LoaderConfig:
    """How a data set is turned into batches.

    Attributes:
        batch_size: Samples in a training step over all ranks together.
        seed: The run's seed.
        device: Where the batches go.
        mode: `device`, `host` or `auto`.
        sampler: `shuffle` takes every sample once an epoch, `balanced` every class equally often.
        workers: Processes that read in mode `host`; 0 reads in this process.
        rank: This process's rank.
        world_size: Number of processes.
    """

    batch_size: int
    seed: int
    device: torch.device
    mode: str = "auto"
    sampler: str = "shuffle"
    workers: int = 0
    rank: int = 0
    world_size: int = 1


class Loader:
    """Batches of uint8 pictures on the device, for every split of a data set.

    Args:
        sets: The data set.
        config: How to load it.
        crop: Where the augmentation's random resized crop is to be taken; used for pictures that are decoded as they
            are read, so that each is decoded no larger than its crop needs, and for those in a CPU's memory, which are
            then not copied in whole. None: whole squares are read.

    Attributes:
        mode: `device` (the splits live on the device as uint8) or `host` (worker processes read them).
        reason: Why, in a line for the log.
        steps_per_epoch: Training batches an epoch. The last, incomplete one counts when every rank gets two samples
            or more of it: batch norm cannot be trained on one.

    Raises:
        ConfigError: A batch size, mode or number of workers out of range, or a batch that ranks cannot share.
        DataError: No training batch, or mode `device` for pictures that are not in memory.
    """

    def __init__(self, sets: DataSets, config: LoaderConfig, crop: CropChooser | None = None) -> None:
        _check(config, sets)
        self.sets = sets
        self.config = config
        self.mode, self.reason = _choose(sets, config)
        if self.mode == "host" and config.workers:
            shape = sets.preprocess
            batch_bytes = config.batch_size * shape.channels * shape.resize**2  # of all ranks: they may share a machine
            self.config = replace(config, workers=workers_that_fit(config.workers, batch_bytes))
        self._crop = crop
        total = len(sets.train)
        full, rest = divmod(total, config.batch_size)
        self.steps_per_epoch = full + (rest >= 2 * config.world_size)
        if self.steps_per_epoch == 0:
            raise DataError(
                f"data {sets.name}: no training batch: {total} pictures on {config.world_size} process(es) "
                f"leave each {rest // config.world_size} of batch_size={config.batch_size}\n"
                "  a batch needs 2 pictures a process; add pictures or use fewer processes"
            )
        self._resident: dict[str, tuple[Tensor, Tensor]] = {}

    def train_batches(self, epoch: int, start: int = 0, img_size: int | None = None) -> Generator[Batch, None, None]:
        """Yield this rank's share of the epoch's global batches.

        Args:
            epoch: Epoch number, from 0; decides the order.
            start: Batches to leave out at the beginning, without reading them.
            img_size: Side that the model sees in this epoch, in pixels, for crops taken while reading; None means
                whole squares.

        Raises:
            DataError: A picture cannot be read.
            WorkerError: A worker process died.
        """
        order = self._order(epoch)
        batches = []
        for step in range(start, self.steps_per_epoch):
            first = step * self.config.batch_size
            whole = order[first : first + self.batch_total(step)]
            batches.append(np.array_split(whole, self.config.world_size)[self.config.rank])
        source = self.sets.train
        if self._crop is None or img_size is None or not self._crops_at_reading(source):
            return self._batches("train", batches)
        cropping = _Cropping(source, self._crop, self.config.seed, epoch, img_size)
        return self._from_host(cropping, batches, self.config.workers if self.mode == "host" else 0)

    def batch_total(self, number: int) -> int:
        """Return how many samples an epoch's training batch `number`, from 0, has over all ranks."""
        return min(self.config.batch_size, len(self.sets.train) - number * self.config.batch_size)

    def _crops_at_reading(self, source: Source) -> TypeGuard[EncodedSource | ArraySource]:
        if isinstance(source, ArraySource):
            # An accelerator crops a whole batch at once.
            return self.config.device.type == "cpu"
        return isinstance(source, EncodedSource)

    def names(self, indices: Indices) -> list[str]:
        """Return what the training pictures at these positions are called: paths, or positions as text."""
        return [self.sets.train.names[i] for i in indices]

    def _order(self, epoch: int) -> Indices:
        train, seed = self.sets.train, self.config.seed
        if self.config.sampler == "balanced":
            return balanced(train.labels, seed, epoch)
        groups = getattr(train, "groups", None)
        return shuffled(len(train), seed, epoch) if groups is None else by_shard(groups, seed, epoch)

    def eval_batches(
        self, split: str, batch_size: int | None = None, limit: int | None = None
    ) -> Generator[Batch, None, None]:
        """Yield a split in order: every sample exactly once over all ranks, each rank a contiguous part.

        Args:
            split: `train`, `val` or `test`.
            batch_size: Samples in this rank's batches; None means its share of a training batch.
            limit: Only what one process by itself would see in so many batches.

        Raises:
            DataError: A picture cannot be read.
            WorkerError: A worker process died.
        """
        size = batch_size or max(1, self.config.batch_size // self.config.world_size)
        count = len(_split(self.sets, split))
        if limit is not None:
            count = min(count, limit * size * self.config.world_size)
        mine = np.array_split(np.arange(count, dtype=np.int64), self.config.world_size)[self.config.rank]
        return self._batches(split, [mine[i : i + size] for i in range(0, len(mine), size)])

    def _batches(self, split: str, batches: list[Indices]) -> Generator[Batch, None, None]:
        source = _split(self.sets, split)
        if self.mode == "device" and isinstance(source, ArraySource):
            return self._from_device(split, source, batches)
        return self._from_host(source, batches, self.config.workers)

    def _from_device(self, split: str, source: ArraySource, batches: list[Indices]) -> Generator[Batch, None, None]:
        device = self.config.device
        if device.type == "cpu":
            for indices in batches:
                yield Batch(source.read(indices), torch.from_numpy(source.labels[indices]), indices)
            return
        if split not in self._resident:
            pixels = source.read(np.arange(len(source))).permute(0, 2, 3, 1)
            self._resident[split] = (pixels.to(device), torch.from_numpy(source.labels).to(device))
        pixels, labels = self._resident[split]
        if not batches:
            return
        # One copy an epoch: a copy a step would make the host wait for the GPU.
        order = torch.from_numpy(np.concatenate(batches)).to(device)
        first = 0
        for indices in batches:
            chosen = order[first : first + len(indices)]
            first += len(indices)
            yield Batch(pixels.index_select(0, chosen).permute(0, 3, 1, 2), labels.index_select(0, chosen), indices)

    def _from_host(
        self, source: Source | _Cropping, batches: list[Indices], workers: int
    ) -> Generator[Batch, None, None]:
        device = self.config.device
        workers = min(workers, len(batches))
        loader: DataLoader[_Read] = DataLoader(
            _Reader(source, batches),
            batch_size=None,
            shuffle=False,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_signals,
            timeout=WORKER_TIMEOUT if workers else 0,
            # Without one of its own, DataLoader draws its workers' seeds from torch's global generator.
            generator=torch.Generator(),
        )
        iterator = iter(loader)
        try:
            for indices in batches:
                read = _next(iterator, workers)
                if isinstance(read, CvtrainError):
                    raise read
                # Not sent by the worker: every tensor that changes process costs a file descriptor and a message.
                targets = torch.from_numpy(source.labels[indices])
                if device.type == "cuda":
                    # The workers' pictures are pinned already; a copy from other memory would wait for the GPU.
                    targets = targets.pin_memory()
                yield Batch(read, targets, indices, cropped=isinstance(source, _Cropping)).to(device)
        finally:
            # Left to garbage collection, workers of an epoch that was broken off may never hear that they are done.
            shutdown = getattr(iterator, "_shutdown_workers", None)
            if shutdown is not None:
                shutdown()


def _next(iterator: Iterator[_Read], workers: int) -> _Read:
    """Return the next item; a worker that died or hangs becomes a `WorkerError`."""
    try:
        return next(iterator)
    except (RuntimeError, ConnectionError, EOFError) as error:
        # A bug in a source arrives as a RuntimeError too, and stays one.
        if workers == 0 or (isinstance(error, RuntimeError) and not str(error).startswith("DataLoader")):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WorkerError(
            f"a data worker died or hangs: {reason}\n"
            "  often memory (also /dev/shm) or a drive that stopped answering\n"
            "  lower workers or batch_size, or use workers=0"
        ) from error


class _Cropping:
    """Training pictures of one epoch, cropped at random while they are read."""

    def __init__(
        self, source: EncodedSource | ArraySource, choose: CropChooser, seed: int, epoch: int, img_size: int
    ) -> None:
        self.labels = source.labels
        self._source = source
        self._choose = choose
        self._key = (seed, epoch)
        self._img_size = img_size

    def read(self, indices: Indices) -> Tensor:
        return self._source.read_crops(indices, self._choose, *self._key, self._img_size)


class _Reader(Dataset[_Read]):
    """One item a batch; a picture that cannot be read is returned as its error.

    A raised exception would reach the main process as the worker's whole traceback.
    """

    def __init__(self, source: Source | _Cropping, batches: list[Indices]) -> None:
        self._source = source
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, position: int) -> _Read:
        indices = self._batches[position]
        try:
            return self._source.read(indices)
        except CvtrainError as error:
            return error


def _unchanged(item: object) -> object:
    return item


def _ignore_signals(_: int) -> None:
    """Leave Ctrl-C and a scheduler's SIGTERM, which reach the whole group, to the main process.

    It finishes its step and saves, and needs its workers until then. A second SIGTERM does end a worker: that is how
    DataLoader and Python's exit remove one that hangs, such as on a queue whose lock a killed worker still holds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _split(sets: DataSets, split: str) -> Source:
    sources: dict[str, Source] = {"train": sets.train, "val": sets.val, "test": sets.test}
    return sources[split]


def _check(config: LoaderConfig, sets: DataSets) -> None:
    if config.batch_size < 2:
        raise ConfigError(f"batch_size={config.batch_size} is out of range\n  allowed: 2 or more")
    if config.batch_size % config.world_size:
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be shared by {config.world_size} processes\n"
            f"  allowed: a multiple of {config.world_size}; batch_size counts all processes together"
        )
    if config.mode not in ("auto", "device", "host"):
        raise ConfigError(f"loader={config.mode}\n  allowed: auto, device, host")
    if config.sampler not in ("shuffle", "balanced"):
        raise ConfigError(f"sampler={config.sampler}\n  allowed: shuffle, balanced")
    if config.sampler == "balanced" and sets.multilabel:
        raise ConfigError(
            "sampler=balanced needs one label a picture\n  use sampler=shuffle and class_weights=balanced"
        )
    if config.sampler == "balanced" and getattr(sets.train, "groups", None) is not None:
        raise ConfigError("sampler=balanced jumps between shards\n  use class_weights=balanced instead")
    if config.workers < 0:
        raise ConfigError(f"workers={config.workers} is out of range\n  allowed: 0 or more")


def _choose(sets: DataSets, config: LoaderConfig) -> tuple[str, str]:
    """Return the mode and the reason for it."""
    size = sum(source.nbytes for source in (sets.train, sets.val, sets.test) if isinstance(source, ArraySource))
    megabytes = f"{size / 2**20:.0f} MiB"
    if config.mode == "host":
        return "host", f"asked for, {config.workers} worker(s)"
    if not isinstance(sets.train, ArraySource):
        if config.mode == "device":
            raise DataError(
                f"loader=device: the pictures of {sets.name} are not held in memory\n"
                "  use loader=host, a smaller img_size, or for files data.cache=disk or a larger data.cache_mb"
            )
        return "host", f"pictures are decoded as they are needed, {config.workers} worker(s)"
    if config.mode == "device":
        return "device", f"asked for, {megabytes}"
    if config.device.type == "cpu":
        return "device", f"{megabytes} of uint8 are in memory or its cache already; whole batches are augmented fastest"
    if size <= DEVICE_LIMIT:
        return "device", f"{megabytes} of uint8 fit on {config.device.type}, where whole batches are augmented"
    return "host", f"{megabytes} exceed the {DEVICE_LIMIT // 2**20} MiB that are kept on {config.device.type}"
