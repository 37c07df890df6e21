"""A folder of pictures, one folder a class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvtrain.core.types import DataSets, Source
from cvtrain.data.picture import MAX_PIXELS, printable, read_picture, verify_picture
from cvtrain.data.scan import Scan, scan
from cvtrain.data.source import ArraySource
from cvtrain.data.splits import checked, fraction, input_size, per_channel, preprocessing, stratified
from cvtrain.errors import ConfigError, DataError

NATIVE_SIZE = 224

# Of ImageNet's training pictures, as every published recipe uses them.
_RGB = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_GREY = ((0.5,), (0.5,))


class FileSource:
    """Pictures decoded as they are asked for.

    Args:
        root: The folder `paths` are relative to.
        paths: N paths.
        labels: `(N,)` int64 class numbers.
        shape: Channels and side of the square that is read, in pixels.
        max_pixels: Largest width × height of a file.
    """

    def __init__(
        self, root: str, paths: list[str], labels: NDArray[np.int64], shape: tuple[int, int], max_pixels: int
    ) -> None:
        self.labels = labels
        self.names = [printable(path) for path in paths]
        self._root = root
        self._paths = paths
        self._shape = shape
        self._max_pixels = max_pixels

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    def read(self, indices: NDArray[np.int64]) -> Tensor:
        """Return uint8 `(B, C, resize, resize)`.

        Raises:
            DataError: A file cannot be read; the message begins with its path.
        """
        return torch.stack([self.read_one(int(index)) for index in indices])

    def read_one(self, index: int) -> Tensor:
        """Return uint8 `(C, resize, resize)`; errors as `read`."""
        channels, resize = self._shape
        return read_picture(self._full(index), resize, channels, self._max_pixels)

    def verify(self, index: int) -> None:
        """Check what shows without decoding; errors as `read`."""
        verify_picture(self._full(index), self._max_pixels)

    def only(self, keep: NDArray[np.int64]) -> FileSource:
        """Return a source of these positions."""
        paths = [self._paths[int(index)] for index in keep]
        return FileSource(self._root, paths, self.labels[keep], self._shape, self._max_pixels)

    def _full(self, index: int) -> str:
        return os.path.join(self._root, self._paths[index])  # noqa: PTH118 - may be no text


@dataclass(frozen=True)
class _Part:
    """A split on its way to a source: relative paths and class numbers."""

    paths: list[str]
    labels: NDArray[np.int64]

    def only(self, keep: NDArray[np.int64]) -> _Part:
        return _Part([self.paths[int(index)] for index in keep], self.labels[keep])


class Folder:
    """`root/CLASS/**/picture`, or the same below `root/train`, `root/val` and `root/test`.

    The classes are those of training, sorted; val and test are mapped to them by name. A missing val or test split is
    carved from training, stratified.

    Args:
        root: The folder; it is never written to.
        channels: 3 for RGB, 1 for grey.
        on_error: `fail` stops with the list of unreadable files; `skip` leaves them out and counts them.
        max_bad: Largest share of unreadable files that `skip` accepts.
        val_fraction: Share of the carved val split.
        test_fraction: Share of the carved test split.
        split_seed: Seed of the carving; not the run's seed, so that runs with other seeds stay comparable.
        cache_mb: Pictures are decoded once and held in memory when, resized, they take up to this many MiB.
        max_pixels: Largest width × height of a file.
        mean: Mean a channel, in 0..1; None means ImageNet's for RGB, 0.5 for grey.
        std: Standard deviation a channel, in 0..1; None means ImageNet's for RGB, 0.5 for grey.

    Attributes:
        splits: After `load`, the paths in each split, relative to `root`.
    """

    def __init__(  # noqa: PLR0913 - one argument a key of the YAML
        self,
        root: str | None = None,
        channels: int = 3,
        on_error: str = "fail",
        max_bad: float = 0.01,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        cache_mb: int = 2048,
        max_pixels: int = MAX_PIXELS,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if channels not in (1, 3):
            raise ConfigError(f"data.channels={channels}\n  allowed: 1 (grey), 3 (RGB)")
        if on_error not in ("fail", "skip"):
            raise ConfigError(f"data.on_error={on_error}\n  allowed: fail, skip")
        if not 0 <= max_bad <= 1 or cache_mb < 0 or not 1 <= max_pixels <= 2 * MAX_PIXELS:
            raise ConfigError(
                f"data.max_bad={max_bad}, data.cache_mb={cache_mb}, data.max_pixels={max_pixels}\n"
                f"  allowed: 0 to 1, 0 or more, 1 to {2 * MAX_PIXELS}"
            )
        if root is None:
            raise ConfigError("data=folder: which folder?\n  give it with data.root=DIR")
        self.root = os.fspath(root)
        self.channels = channels
        self.on_error = on_error
        self.max_bad = float(max_bad)
        self.fractions = {
            "val": fraction("val_fraction", val_fraction),
            "test": fraction("test_fraction", test_fraction),
        }
        self.split_seed = int(split_seed)
        self.cache_bytes = int(cache_mb) << 20
        self.max_pixels = int(max_pixels)
        default_mean, default_std = _RGB if channels == 3 else _GREY
        self.mean = per_channel("mean", mean) or default_mean
        self.std = per_channel("std", std) or default_std
        self.splits: dict[str, list[str]] = {}

    def load(self, img_size: int | None, eval_resize: float, workers: int) -> DataSets:
        """Find, check and, where they fit in memory, decode all pictures.

        Args:
            img_size: Side the model sees, in pixels; None means 224.
            eval_resize: Side that is read, as a multiple of `img_size`.
            workers: Threads that decode.

        Raises:
            DataError: Nothing to train on, classes that differ between splits, or unreadable files.
        """
        size, resize = input_size(NATIVE_SIZE, img_size, eval_resize)
        found = scan(self.root)
        class_names, parts = self._parts(found)
        files = {
            split: FileSource(self.root, part.paths, part.labels, (self.channels, resize), self.max_pixels)
            for split, part in parts.items()
        }
        total = sum(len(source) for source in files.values())
        needed = total * self.channels * resize * resize
        if needed <= self.cache_bytes:
            sources, bad = _decode(files, (self.channels, resize, resize), workers)
            found.notes.append(f"{total} pictures decoded into {needed / 2**20:.0f} MiB of memory")
        else:
            sources, bad = _verify(files, workers)
            found.notes.append(
                f"{total} pictures are decoded as they are needed: {needed / 2**20:.0f} MiB exceed "
                f"data.cache_mb={self.cache_bytes >> 20}"
            )
        self._judge(bad, total, found.notes)
        self._check_classes(class_names, sources["train"])
        self.splits = {split: list(source.names) for split, source in sources.items()}
        return checked(
            DataSets(
                name="folder",
                class_names=[printable(name) for name in class_names],
                preprocess=preprocessing((size, resize, self.channels), self.mean, self.std),
                train=sources["train"],
                val=sources["val"],
                test=sources["test"],
                skipped=len(bad),
                notes=found.notes,
            )
        )

    def _parts(self, found: Scan) -> tuple[list[str], dict[str, _Part]]:
        """Return the class list, frozen from training, and all three splits."""
        train_name = "train" if "train" in found.splits else ""
        class_names = list(found.splits[train_name])
        for name, paths in found.splits[train_name].items():
            if not paths:
                where = "/".join(part for part in (printable(self.root), train_name, printable(name)) if part)
                raise DataError(
                    f"data=folder: class {printable(name)!r} holds no picture: {where}\n"
                    "  add pictures or remove the folder (a folder reached twice by links is read once)"
                )
        numbers = {name: number for number, name in enumerate(class_names)}
        parts = {}
        for split, classes in found.splits.items():
            strange = [name for name, paths in classes.items() if paths and name not in numbers]
            if strange:
                raise DataError(
                    f"data=folder: class {printable(strange[0])!r} is in {split} but not in train\n"
                    f"  train has: {', '.join(printable(name) for name in class_names[:20])}; "
                    "add it to train or remove it"
                )
            missing = [printable(name) for name in class_names if not classes.get(name)]
            if missing:
                found.notes.append(f"{split} has no picture of {len(missing)} class(es): {', '.join(missing[:10])}")
            pairs = [(path, numbers[name]) for name, paths in classes.items() for path in paths]
            parts[split or "train"] = _Part([path for path, _ in pairs], np.array([n for _, n in pairs], np.int64))
        return class_names, self._carve(parts, found.notes)

    def _carve(self, parts: dict[str, _Part], notes: list[str]) -> dict[str, _Part]:
        """Return all three splits, the missing ones carved from training.

        The carving sees all files, readable or not: a file that is damaged later moves no other one.
        """
        absent = [split for split in ("val", "test") if split not in parts]
        if absent:
            train = parts["train"]
            shares = tuple(self.fractions[split] for split in absent)
            kept, *carved = stratified(train.labels, shares, self.split_seed)
            parts["train"] = train.only(kept)
            for split, where in zip(absent, carved, strict=True):
                parts[split] = train.only(where)
            said = " and ".join(f"{self.fractions[split]:g} for {split}" for split in absent)
            notes.append(f"carved from training, stratified: {said}, data.split_seed={self.split_seed}")
        return {split: parts[split] for split in ("train", "val", "test")}

    def _judge(self, bad: list[str], total: int, notes: list[str]) -> None:
        """Stop, or note what was left out."""
        if not bad:
            return
        shown = "; ".join(bad[:10]) + ("; …" if len(bad) > 10 else "")
        if self.on_error == "fail":
            raise DataError(
                f"data=folder: {len(bad)} of {total} pictures cannot be read: {shown}\n"
                "  repair or remove them, or leave them out with data.on_error=skip"
            )
        if len(bad) > self.max_bad * total:
            raise DataError(
                f"data=folder: {len(bad)} of {total} pictures cannot be read, more than "
                f"data.max_bad={self.max_bad:g}: {shown}\n"
                "  repair or remove them, or raise data.max_bad"
            )
        notes.append(f"{len(bad)} of {total} pictures cannot be read and are left out: {shown}")

    def _check_classes(self, class_names: list[str], train: Source) -> None:
        counts = np.bincount(train.labels, minlength=len(class_names))
        empty = [printable(class_names[int(i)]) for i in np.flatnonzero(counts == 0)]
        if empty:
            raise DataError(
                f"data=folder: no readable training picture of class {', '.join(empty[:10])}\n"
                "  add pictures or remove the folder"
            )


def _in_threads(function: Callable[[int], str | None], count: int, workers: int) -> list[str | None]:
    """Return `function` of 0..count-1 in order; Pillow lets other threads run while it decodes."""
    pool = ThreadPoolExecutor(max(1, workers))
    # Pillow warns of sizes that are refused here and of EXIF that does not matter. Filters are the process's, so they
    # are set outside the pool.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            return list(pool.map(function, range(count)))
        finally:
            # Ctrl-C must not wait for the pictures that are still in the queue.
            pool.shutdown(wait=True, cancel_futures=True)


def _decode(
    files: dict[str, FileSource], shape: tuple[int, int, int], workers: int
) -> tuple[dict[str, Source], list[str]]:
    """Return sources in memory, and a line for each file that was left out."""
    sources: dict[str, Source] = {}
    bad: list[str] = []
    for split, source in files.items():
        images = torch.empty((len(source), *shape), dtype=torch.uint8)

        def fill(index: int, source: FileSource = source, images: Tensor = images) -> str | None:
            try:
                images[index] = source.read_one(index)
            except DataError as error:
                return str(error)
            return None

        reasons = _in_threads(fill, len(source), workers)
        keep = np.array([i for i, reason in enumerate(reasons) if reason is None], np.int64)
        bad.extend(reason for reason in reasons if reason is not None)
        if len(keep) < len(source):
            images = images[torch.from_numpy(keep)]
        kept = source.only(keep)
        sources[split] = ArraySource(images, kept.labels, kept.names)
    return sources, bad


def _verify(files: dict[str, FileSource], workers: int) -> tuple[dict[str, Source], list[str]]:
    """Return sources that decode on demand, and a line for each file that was left out."""
    sources: dict[str, Source] = {}
    bad: list[str] = []
    for split, source in files.items():

        def look(index: int, source: FileSource = source) -> str | None:
            try:
                source.verify(index)
            except DataError as error:
                return str(error)
            return None

        reasons = _in_threads(look, len(source), workers)
        bad.extend(reason for reason in reasons if reason is not None)
        sources[split] = source.only(np.array([i for i, reason in enumerate(reasons) if reason is None], np.int64))
    return sources, bad
