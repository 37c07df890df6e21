"""What all data sets share: splits, folds, limits, and the way from stored pictures to sources."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.core.types import BILINEAR, INTERPOLATIONS, DataSets, Source
from cvtrain.data.cache import Cache, Verdicts
from cvtrain.data.collection import Collection, Joined, Part
from cvtrain.data.picture import MAX_PIXELS, check_picture, read_picture
from cvtrain.data.source import ArraySource, EncodedSource, array_source
from cvtrain.data.splits import (
    checked,
    fold_of,
    fraction,
    input_size,
    limited,
    measured,
    per_channel,
    preprocessing,
    stratified,
)
from cvtrain.errors import ConfigError, DataError

SHOWN = 50
"""Unreadable pictures that a message names; a file in the run folder names all."""

# Of ImageNet's training pictures, as every published recipe uses them.
_RGB = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(kw_only=True)
class DataSet(ABC):
    """A data set that reads itself as a `Collection`; the rest happens here, alike for all.

    Attributes:
        val_fraction: Share for val, stratified, where the set has none of its own.
        test_fraction: Share for test, stratified, where the set has none of its own.
        split_seed: Seed of these splits; not the run's seed, so that runs with other seeds stay comparable.
        folds: Number of cross-validation folds; null for none. A fold takes the place of test, so that every
            picture outside an official test split is tested once; the official one then stays unread.
        fold: Which fold is the test, from 0; null lets the command line run all of them, one after the other.
        limit: Training pictures to keep, stratified; null keeps all. Val and test stay whole, so that runs with
            different limits are measured on the same pictures.
        mean: Mean a channel, in 0..1; null: measured on training arrays, ImageNet's for files.
        std: Standard deviation a channel, in 0..1; null likewise.
        interpolation: How pictures are resized as they are read: `bilinear`, which null stands for, or `bicubic`.
        splits: After `load`, the names in each split.
    """

    val_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0
    folds: int | None = None
    fold: int | None = None
    limit: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    interpolation: str | None = None
    splits: dict[str, list[str]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: One is out of range.
        """
        fraction("val_fraction", self.val_fraction)
        fraction("test_fraction", self.test_fraction)
        if self.folds is not None and (self.folds < 2 or not 0 <= (self.fold or 0) < self.folds):
            raise ConfigError(
                f"data.folds={self.folds}, data.fold={self.fold}\n"
                "  allowed: folds of 2 or more, fold from 0 to folds - 1"
            )
        self.mean, self.std = per_channel("mean", self.mean), per_channel("std", self.std)
        if self.interpolation not in (None, *INTERPOLATIONS):
            raise ConfigError(
                f"data.interpolation={self.interpolation}\n  allowed: {', '.join(INTERPOLATIONS)}, or null"
            )

    @abstractmethod
    def read(self) -> Collection:
        """Find the pictures and labels; nothing needs to be decoded yet.

        Raises:
            DataError: They are absent, damaged, or not what a classifier can be trained on.
        """

    def load(self, img_size: int | None, eval_resize: float, workers: int) -> DataSets:
        """Return the data set, split, checked, and decoded where it fits.

        Args:
            img_size: Side the model sees, in pixels; None means the pictures' own.
            eval_resize: Side that is read, as a multiple of `img_size`.
            workers: Threads that decode and resize.

        Raises:
            DataError: Nothing to train on, or pictures that cannot be read.
        """
        found = self.read()
        size, resize = input_size(found.native_size, img_size, eval_resize)
        parts = self._split(found)
        mean, std = self._statistics(found, parts["train"])
        sources, bad = self._sources(found, parts, resize, workers)
        self.splits = {split: list(source.names) for split, source in sources.items()}
        return checked(
            DataSets(
                name=found.name,
                class_names=found.class_names,
                preprocess=preprocessing((size, resize, found.channels), mean, std, self.interpolation or BILINEAR),
                train=sources["train"],
                val=sources["val"],
                test=sources["test"],
                skipped=len(bad),
                notes=found.notes,
                multilabel=found.multilabel,
                bad=bad,
            )
        )

    def _sources(
        self, found: Collection, parts: dict[str, Part], resize: int, workers: int
    ) -> tuple[dict[str, Source], list[str]]:
        """Return a source a split, and a line for each picture that was left out."""
        sources: dict[str, Source] = {}
        for split, part in parts.items():
            if not isinstance(part.pictures, np.ndarray):
                raise TypeError(f"{found.name}: encoded pictures need an EncodedDataSet")
            sources[split] = array_source(
                part.pictures, part.labels, part.names, resize, workers, self.interpolation or BILINEAR
            )
        return sources, []

    def _split(self, found: Collection) -> dict[str, Part]:
        """Return all three splits: the set's own, carved from training, or a fold; training limited.

        The carving sees all pictures, readable or not: one that is damaged later moves no other one.
        """
        parts = dict(found.parts)
        shares = {"val": self.val_fraction, "test": self.test_fraction}
        if self.folds is not None:
            pool = parts["train"].joined(parts["val"]) if "val" in parts else parts["train"]
            rest, tested = fold_of(pool.labels, self.folds, self.fold or 0, self.split_seed)
            if "test" in parts:
                found.notes.append(f"{self.folds} folds: the official test pictures stay unread, a fold is the test")
            parts = {"train": pool.only(rest), "test": pool.only(tested)}
            found.notes.append(f"test is fold {self.fold or 0} of {self.folds}, data.split_seed={self.split_seed}")
        absent = [split for split in ("val", "test") if split not in parts]
        if absent:
            train = parts["train"]
            kept, *carved = stratified(train.labels, tuple(shares[split] for split in absent), self.split_seed)
            parts["train"] = train.only(kept)
            for split, where in zip(absent, carved, strict=True):
                parts[split] = train.only(where)
            said = " and ".join(f"{shares[split]:g} for {split}" for split in absent)
            found.notes.append(f"carved from training, stratified: {said}, data.split_seed={self.split_seed}")
        if self.limit is not None:
            whole = len(parts["train"])
            parts["train"] = parts["train"].only(limited(parts["train"].labels, self.limit, self.split_seed))
            found.notes.append(f"data.limit: {len(parts['train'])} of {whole} training pictures, stratified")
        return {split: parts[split] for split in ("train", "val", "test")}

    def _statistics(self, found: Collection, train: Part) -> tuple[tuple[float, ...], tuple[float, ...]]:
        mean, std = _RGB if found.channels == 3 else ((0.5,) * found.channels, (0.5,) * found.channels)
        if isinstance(train.pictures, np.ndarray) and (self.mean is None or self.std is None) and len(train):
            mean, std = measured(train.pictures)
        return tuple(self.mean or mean), tuple(self.std or std)


@dataclass(kw_only=True)
class EncodedDataSet(DataSet):
    """A data set of files, shards or tables of encoded pictures.

    Attributes:
        channels: 3 for RGB, 1 for grey.
        on_error: `fail` stops with the list of unreadable pictures; `skip` leaves them out and counts them.
        max_bad: Largest share of unreadable pictures that `skip` accepts.
        allow_empty: Whether a class may have no readable training picture.
        cache: `memory` decodes once a run, `disk` once for all runs, `none` at each reading; `auto` takes memory when
            the pictures, resized, fit in `cache_mb`, else none.
        cache_mb: Limit of `auto`, in MiB.
        cache_dir: Folder of `disk`; null means `$XDG_CACHE_HOME/cvtrain` or `~/.cache/cvtrain`.
        max_pixels: Largest width × height of a picture.
    """

    channels: int = 3
    on_error: str = "fail"
    max_bad: float = 0.01
    allow_empty: bool = False
    cache: str = "auto"
    cache_mb: int = 2048
    cache_dir: str | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        """Check the settings; errors as in `DataSet`."""
        super().__post_init__()
        if self.channels not in (1, 3):
            raise ConfigError(f"data.channels={self.channels}\n  allowed: 1 (grey), 3 (RGB)")
        if self.on_error not in ("fail", "skip"):
            raise ConfigError(f"data.on_error={self.on_error}\n  allowed: fail, skip")
        if self.cache not in ("auto", "none", "memory", "disk"):
            raise ConfigError(f"data.cache={self.cache}\n  allowed: auto, none, memory, disk")
        if not 0 <= self.max_bad <= 1 or self.cache_mb < 0 or not 1 <= self.max_pixels <= 2 * MAX_PIXELS:
            raise ConfigError(
                f"data.max_bad={self.max_bad}, data.cache_mb={self.cache_mb}, data.max_pixels={self.max_pixels}\n"
                f"  allowed: 0 to 1, 0 or more, 1 to {2 * MAX_PIXELS}"
            )

    def _sources(
        self, found: Collection, parts: dict[str, Part], resize: int, workers: int
    ) -> tuple[dict[str, Source], list[str]]:
        files = {split: self._encoded(part, resize) for split, part in parts.items()}
        everything = _Everything(list(files.values()), workers)
        images, verdicts = self._read(everything, resize, found.notes)
        if verdicts.several:
            found.notes.append(
                f"{len(verdicts.several)} picture(s) are animations or have several pages: the first frame is taken, "
                f"such as {verdicts.several[0]}"
            )
        bad = [verdicts.bad[row] for row in sorted(verdicts.bad)]
        self._judge(found.name, bad, len(everything.rows), found.notes)
        sources: dict[str, Source] = {}
        first = 0
        for split, source in files.items():
            rows = everything.rows[first : first + len(source)]
            first += len(source)
            keep = np.flatnonzero([row not in verdicts.bad for row in rows.tolist()])
            part = parts[split].only(keep)
            kept = self._encoded(part, resize)
            sources[split] = (
                kept if images is None else ArraySource(images, part.labels, part.names, rows[keep], kept.paths)
            )
        self._check_classes(found, sources["train"])
        return sources, bad

    def _encoded(self, part: Part, resize: int) -> EncodedSource:
        return EncodedSource(part, self.channels, resize, self.max_pixels, self.interpolation or BILINEAR)

    def _read(self, everything: _Everything, resize: int, notes: list[str]) -> tuple[Tensor | None, Verdicts]:
        """Return all pictures as the rows of one tensor, None when they are decoded at each reading."""
        shape = (len(everything.rows), resize, resize, self.channels)
        needed = int(np.prod(shape))
        cache = Cache(self.cache_dir)
        settings = (shape, self.max_pixels, self.interpolation or BILINEAR)

        def fill(into: NDArray[np.uint8]) -> Verdicts:
            return everything.decode(into)

        if self.cache == "disk":
            pixels, verdicts, note = cache.pixels(cache.key(everything.identities(), settings), shape, fill)
            notes.append(note)
            return torch.from_numpy(pixels).permute(0, 3, 1, 2), verdicts
        if self.cache == "memory" or (self.cache == "auto" and needed <= self.cache_mb << 20):
            array = np.empty(shape, np.uint8)
            verdicts = fill(array)
            notes.append(f"{shape[0]} pictures decoded into {needed / 2**20:.0f} MiB of memory")
            return torch.from_numpy(array).permute(0, 3, 1, 2), verdicts
        key = cache.key(everything.identities(), ("checked", self.max_pixels))
        verdicts, known = cache.verdicts(key, lambda: self._checked(everything))
        why = "asked for" if self.cache == "none" else f"{needed / 2**20:.0f} MiB exceed data.cache_mb={self.cache_mb}"
        notes.append(
            f"{shape[0]} pictures are decoded at each reading ({why}; data.cache=disk decodes once for all runs); "
            + ("found readable by an earlier run" if known else "each was decoded once to see that it is readable")
        )
        return None, verdicts

    def _checked(self, everything: _Everything) -> Verdicts:
        """Return which pictures cannot be read; overridden where that is known without reading all of them."""
        return everything.check(self.max_pixels)

    def _judge(self, name: str, bad: list[str], total: int, notes: list[str]) -> None:
        """Stop, or note what was left out."""
        if not bad:
            return
        more = f"; … and {len(bad) - SHOWN} more, all in unreadable.txt of the run folder" if len(bad) > SHOWN else ""
        listed = "; ".join(bad[:SHOWN]) + more
        if self.on_error == "fail":
            error = DataError(
                f"data={name}: {len(bad)} of {total} pictures cannot be read: {listed}\n"
                "  repair or remove them, or leave them out with data.on_error=skip"
            )
            error.details = bad
            raise error
        if len(bad) > self.max_bad * total:
            error = DataError(
                f"data={name}: {len(bad)} of {total} pictures cannot be read, more than "
                f"data.max_bad={self.max_bad:g}: {listed}\n"
                "  repair or remove them, or raise data.max_bad"
            )
            error.details = bad
            raise error
        notes.append(f"{len(bad)} of {total} pictures cannot be read and are left out: {'; '.join(bad[:10])}" + more)

    def _check_classes(self, found: Collection, train: Source) -> None:
        if train.labels.ndim == 2:
            counts = train.labels.sum(axis=0)
        else:
            counts = np.bincount(train.labels[train.labels >= 0], minlength=len(found.class_names))
        empty = [name for name, count in zip(found.class_names, counts.tolist(), strict=False) if count == 0]
        if not empty:
            return
        said = f"no readable training picture of {len(empty)} class(es): {', '.join(empty[:10])}"
        if not self.allow_empty:
            raise DataError(
                f"data={found.name}: {said}\n  add pictures, remove the class, or accept it with data.allow_empty=true"
            )
        found.notes.append(said)


class _Everything:
    """The pictures of all splits in one order of their own, the same for any split, fold or seed.

    Attributes:
        rows: `(M,)` int64: which row of that order each picture of the splits, one after the other, has.
    """

    def __init__(self, sources: list[EncodedSource], workers: int) -> None:
        self._pictures = Joined([source.pictures for source in sources])
        self._settings = sources[0]
        self._workers = workers
        self._identities = [self._pictures.identity(index) for index in range(len(self._pictures))]
        self._order = np.argsort(np.array(self._identities, dtype=object), kind="stable")
        self.rows = np.empty(len(self._order), np.int64)
        self.rows[self._order] = np.arange(len(self._order))

    def identities(self) -> list[str]:
        """Return one text a row."""
        return [self._identities[int(index)] for index in self._order]

    def decode(self, into: NDArray[np.uint8]) -> Verdicts:
        """Write the pictures, read as the sources read them, into uint8 `(M, resize, resize, channels)`."""
        given = self._settings

        def one(row: int, index: int, several: list[str]) -> None:
            content, place = self._pictures.content(index), self._pictures.place(index)
            picture = read_picture(
                content, given.resize, given.channels, given.max_pixels, place, several.append, given.interpolation
            )
            into[row] = picture.permute(1, 2, 0).numpy()

        return self._look(one)

    def check(self, max_pixels: int) -> Verdicts:
        """Decode each picture as small as possible."""

        def one(row: int, index: int, several: list[str]) -> None:
            content, place = self._pictures.content(index), self._pictures.place(index)
            check_picture(content, max_pixels, place, several.append)

        return self._look(one)

    def _look(self, one: Callable[[int, int, list[str]], None]) -> Verdicts:
        """Apply `one` to every row in threads: Pillow lets other threads run while it decodes."""
        verdicts = Verdicts()

        def judged(row: int) -> None:
            try:
                one(row, int(self._order[row]), verdicts.several)
            except DataError as error:
                verdicts.bad[row] = str(error)
                # Pillow's own errors about damaged data have no number; the system's have one, and may pass.
                verdicts.passing |= isinstance(error.__cause__, OSError) and error.__cause__.errno is not None

        pool = ThreadPoolExecutor(max(1, self._workers))
        # Pillow warns of sizes that are refused here and of EXIF that does not matter. Filters are the process's, so
        # they are set outside the pool.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            try:
                list(pool.map(judged, range(len(self._order))))
            finally:
                # Ctrl-C must not wait for the pictures that are still in the queue.
                pool.shutdown(wait=True, cancel_futures=True)
        verdicts.several.sort()
        return verdicts
