"""WebDataset's tar shards, local or on a web server, for data larger than the machine."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cvtrain.core.files import write_atomic
from cvtrain.core.types import Source
from cvtrain.data import remote
from cvtrain.data.base import EncodedDataSet, _Everything
from cvtrain.data.cache import Cache, Verdicts
from cvtrain.data.collection import Collection, Part
from cvtrain.data.order import WINDOW_SHARDS
from cvtrain.data.picture import printable
from cvtrain.data.scan import SPLITS
from cvtrain.data.tars import INDEX_FORMAT, Index, LocalShard, Shard, TarPictures, index_tar
from cvtrain.errors import ConfigError, DataError, StorageError

NATIVE_SIZE = 224
_ASKING = 8
"""Requests for the shards' sizes at a time."""

Given = TypeVar("Given")
Result = TypeVar("Result")
Parts = dict[str, list[Shard]]


@dataclass
class _Known:
    """What the `index.json` files and `classes.txt` beside the shards say."""

    class_names: list[str] | None = None
    indexes: dict[str, Index] = field(default_factory=dict)


@dataclass(kw_only=True)
class Shards(EncodedDataSet):
    """Tar files of samples: pictures (`KEY.jpg`, `KEY.png`, …), each with its class number as text (`KEY.cls`).

    Class names come from the `index.json` or the `classes.txt` (a name a line) beside the shards, else the numbers
    are the names. An epoch visits the shards in windows of a few, so that each is fetched about once; nothing is
    unpacked, and a URL is only asked when one is given.

    Attributes:
        root: A file, a folder of them, or a URL; `{000000..000012}` and `{a,b}` stand for several. In a folder, names
            that begin with train, val or test say the split.
        val_root: The same, for val; null: carved from training, stratified.
        test_root: The same, for test; null likewise.
        shards_mb: Limit of the local copies of remote shards, in MiB.
    """

    root: str | None = None
    val_root: str | None = None
    test_root: str | None = None
    shards_mb: int = 20_000
    _wrong: list[str] = field(default_factory=list, init=False, repr=False)
    _bad: dict[str, str] | None = field(default=None, init=False, repr=False)

    def read(self) -> Collection:
        """Find shards and samples; errors as in `DataSet.read`."""
        parts = self._located()
        away = [shard for shards in parts.values() for shard in shards if isinstance(shard, remote.RemoteShard)]
        notes: list[str] = []
        self._check_room(away, parts, notes)
        known = self._known(parts)
        # A remote picture is decoded in the one pass in which it is there anyway.
        limit = self.max_pixels if away else None
        everything = [shard for shards in parts.values() for shard in shards]
        found = dict(
            zip(
                (shard.identity for shard in everything),
                _threads(lambda shard: self._index(shard, known, limit), everything, WINDOW_SHARDS),
                strict=True,
            )
        )
        self._judge_samples(everything, found, notes)
        classes, numbers = _classes(parts, found, known)
        collected = {split: self._part(shards, found, split, numbers) for split, shards in parts.items()}
        self._bad = self._known_bad(collected, found, parts) if away else None
        said = ", ".join(f"{len(shards)} shard(s) for {split}" for split, shards in parts.items())
        notes.append(f"{said}; an epoch mixes pictures within windows of {WINDOW_SHARDS} shards")
        _warn_of_sorted(parts["train"], found, notes)
        return Collection("shards", classes, self.channels, NATIVE_SIZE, collected, notes)

    def _sources(
        self, found: Collection, parts: dict[str, Part], resize: int, workers: int
    ) -> tuple[dict[str, Source], list[str]]:
        sources, bad = super()._sources(found, parts, resize, workers)
        return sources, self._wrong + bad

    def _checked(self, everything: _Everything) -> Verdicts:
        if self._bad is None:
            return super()._checked(everything)
        rows = enumerate(everything.identities())
        return Verdicts({row: self._bad[identity] for row, identity in rows if identity in self._bad})

    def _located(self) -> Parts:
        """Return the shards of each split."""
        if self.root is None:
            raise ConfigError(
                "data=shards: which shards?\n  give them with data.root=FOLDER, or data.root=\"'DIR/{000..123}.tar'\""
            )
        store = remote.Store(Cache(self.cache_dir).folder / "shards", self.shards_mb << 20)
        places = _splits_of(str(self.root))
        for split, root in (("val", self.val_root), ("test", self.test_root)):
            if root is None:
                continue
            if split in places:
                raise ConfigError(f"data.{split}_root={root}, but data.root holds {split} shards too\n  remove one")
            given = _splits_of(str(root))
            places[split] = given.get(split) or given.get("train") or []
        empty = [split for split in ("train", *places) if not places.get(split)]
        if empty:
            raise DataError(
                f"data=shards: no shard of {empty[0]} in {printable(str(self.root))}\n"
                f"  begin their names with {empty[0]}-, or give other ones"
            )
        flat = [location for locations in places.values() for location in locations]
        opened = _threads(lambda location: _shard(location, store), flat, _ASKING)
        # By two paths or links it would be in two splits as easily as by one.
        again = [identity for identity, count in Counter(shard.identity for shard in opened).items() if count > 1]
        if again:
            shown = next(shard.shown for shard in opened if shard.identity == again[0])
            raise DataError(f"data=shards: {shown} is given twice\n  a shard belongs to one split, once")
        shards = iter(opened)
        return {split: [next(shards) for _ in locations] for split, locations in places.items()}

    def _check_room(self, away: Sequence[Shard], parts: Parts, notes: list[str]) -> None:
        window = sum(sorted(shard.size for shard in away)[-WINDOW_SHARDS:])
        if window > self.shards_mb << 20:
            raise ConfigError(
                f"data.shards_mb={self.shards_mb}: {WINDOW_SHARDS} shards, mixed at a time, take {window >> 20} MiB\n"
                f"  allowed: {-(-window >> 20)} or more; twice that avoids fetching a shard again"
            )
        total = sum(shard.size for shard in away)
        if total > self.shards_mb << 20 and not {"val", "test"} <= parts.keys():
            notes.append(
                f"{total / 2**20:.0f} MiB of remote shards exceed data.shards_mb={self.shards_mb}, and val or test are "
                "spread over all of them: each evaluation fetches them again; data.val_root and data.test_root avoid it"
            )

    def _known(self, parts: Parts) -> _Known:
        """Read what lies beside the shards; what does not fit is left unused."""
        known = _Known()
        for shards in parts.values():
            for _, group in itertools.groupby(shards, _folder):
                members = list(group)
                content = _json(members[0])
                self._use_index(known, members, content)
                names = _class_names(members[0], content)
                known.class_names = known.class_names or names
                if names is not None and names != known.class_names:
                    raise DataError(
                        f"data=shards: the class names beside {members[0].shown} are others than those of training\n"
                        "  numbers would mean different classes; write the shards with one list of classes"
                    )
        return known

    def _use_index(self, known: _Known, shards: Sequence[Shard], content: dict[str, Any]) -> None:
        with contextlib.suppress(KeyError, TypeError, ValueError, OSError):
            if int(content["max_pixels"]) > self.max_pixels:
                return
            for shard in shards:
                entry = content["shards"].get(_file_name(shard))
                if entry is None or entry["size"] != shard.size:
                    continue
                # Written before the shard was: it belongs to another one.
                if isinstance(shard, LocalShard) and _beside(shard, "index.json").stat().st_mtime_ns < shard.mtime_ns:
                    continue
                known.indexes[shard.identity] = Index.from_dict(entry, shard.size)

    def _index(self, shard: Shard, known: _Known, max_pixels: int | None) -> Index:
        """Return the index of a shard: from beside it, from an earlier run, or by one pass over it."""
        index = known.indexes.get(shard.identity)
        if index is not None:
            return index
        key = hashlib.sha256(repr((INDEX_FORMAT, shard.identity, max_pixels)).encode()).hexdigest()[:32]
        path = Cache(self.cache_dir).folder / "indexes" / f"{key}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            return Index.from_dict(json.loads(path.read_text()), shard.size)
        index = index_tar(shard, max_pixels)
        with contextlib.suppress(OSError, StorageError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(index.to_dict()))
        return index

    def _judge_samples(self, shards: Sequence[Shard], found: dict[str, Index], notes: list[str]) -> None:
        self._wrong = [f"{shard.shown}:{text}" for shard in shards for text in found[shard.identity].wrong]
        total = len(self._wrong) + sum(len(index) for index in found.values())
        self._judge("shards", self._wrong, total, notes)
        if total == 0:
            raise DataError(
                f"data=shards: no samples in {len(shards)} shard(s), such as {shards[0].shown}\n"
                "  expected pictures with their class number beside them: KEY.jpg and KEY.cls"
            )

    def _part(self, shards: Sequence[Shard], found: dict[str, Index], split: str, numbers: dict[int, int]) -> Part:
        indexes = [found[shard.identity] for shard in shards]
        which = np.repeat(np.arange(len(shards), dtype=np.int64), [len(index) for index in indexes])
        spans = np.concatenate([np.stack([index.offsets, index.sizes], axis=1) for index in indexes])
        inside = [f"{key}.{end}" for index in indexes for key, end in zip(index.keys, index.extensions, strict=True)]
        labels = np.concatenate([index.labels for index in indexes])
        for label in np.unique(labels).tolist():
            if label not in numbers:
                first = int(np.flatnonzero(labels == label)[0])
                raise DataError(
                    f"data=shards: class {label} of {split} is not among the {len(numbers)} of training, first at "
                    f"{shards[int(which[first])].shown}:{inside[first]}\n"
                    "  remove it, or name all classes in classes.txt beside the shards"
                )
        mapped = np.array([numbers[label] for label in labels.tolist()], np.int64)
        files = [_file_name(shard) for shard in shards]
        names = [f"{files[number]}/{name}" for number, name in zip(which.tolist(), inside, strict=True)]
        return Part(TarPictures(shards, which, spans, inside), mapped, names, which)

    def _known_bad(self, collected: dict[str, Part], found: dict[str, Index], parts: Parts) -> dict[str, str]:
        bad = {}
        for split, part in collected.items():
            first = 0
            for shard in parts[split]:
                index = found[shard.identity]
                for position, reason in (index.bad or {}).items():
                    if not isinstance(part.pictures, np.ndarray):
                        at = first + position
                        bad[part.pictures.identity(at)] = f"{part.pictures.place(at)}: {reason}"
                first += len(index)
        return bad


def expand(pattern: str) -> list[str]:
    """Return what a shell makes of `{000..012}`, keeping leading zeros, and of `{a,b}`.

    Raises:
        ConfigError: Other braces, or a range that goes backwards.
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise ConfigError(f"data.root={pattern}: a brace is left over\n  write DIR/train-{{000000..000012}}.tar")
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if bounds is not None:
        low, high = int(bounds[1]), int(bounds[2])
        items = [f"{number:0{len(bounds[1])}d}" for number in range(low, high + 1)]
    else:
        items = found[1].split(",") if "," in found[1] else []
    if not items:
        raise ConfigError(f"data.root={pattern}: {{{found[1]}}} stands for nothing\n  write {{000000..000012}}")
    return [rest for item in items for rest in expand(pattern[: found.start()] + item + pattern[found.end() :])]


def _splits_of(root: str) -> dict[str, list[str]]:
    """Return split -> paths and URLs."""
    locations = expand(root)
    for location in locations:
        scheme = location.partition("://")[0].lower() if "://" in location else ""
        if scheme not in ("", "http", "https"):
            raise ConfigError(
                f"data.root={_shown(location)}: {scheme} is not read\n  give an http(s) URL, a file or a folder"
            )
    folder = Path(locations[0])
    if len(locations) > 1 or "://" in locations[0] or not folder.is_dir():
        return {"train": locations}
    names = sorted(path.name for path in folder.iterdir() if path.suffix == ".tar" and not path.name.startswith("."))
    if not names:
        raise DataError(f"data=shards: no .tar file in {folder.absolute()}\n  give a folder of tar files, or a URL")
    splits: dict[str, list[str]] = {}
    stated = {name: SPLITS.get(re.split(r"[-_.]", name)[0].lower()) for name in names}
    unclear = [name for name, split in stated.items() if split is None]
    if unclear and len(unclear) < len(names):
        raise DataError(
            f"data=shards: {printable(str(folder / unclear[0]))} names no split, as others there do\n"
            "  begin each name with train-, val- or test-, or none"
        )
    for name in names:
        splits.setdefault(stated[name] or "train", []).append(str(folder / name))
    return splits


def _shard(location: str, store: remote.Store) -> Shard:
    return remote.RemoteShard(location, store) if "://" in location else LocalShard(Path(location))


def _shown(location: str) -> str:
    return remote.shown(location) if "://" in location else printable(location)


def _file_name(shard: Shard) -> str:
    return printable(shard.shown.rpartition("/")[2])


def _folder(shard: Shard) -> str:
    return shard.shown.rpartition("/")[0]


def _beside(shard: LocalShard, name: str) -> Path:
    return shard.path.parent / name


def _text_beside(shard: Shard, name: str) -> str | None:
    if isinstance(shard, remote.RemoteShard):
        return remote.text(remote.beside(shard.url, name))
    if isinstance(shard, LocalShard):
        with contextlib.suppress(OSError):
            return _beside(shard, name).read_text(encoding="utf-8", errors="replace")
    return None


def _json(shard: Shard) -> dict[str, Any]:
    """Return the `index.json` beside a shard, empty when there is none of ours."""
    with contextlib.suppress(ValueError):
        content = json.loads(_text_beside(shard, "index.json") or "{}")
        if isinstance(content, dict) and content.get("format") == INDEX_FORMAT:
            return content
    return {}


def _class_names(shard: Shard, content: dict[str, Any]) -> list[str] | None:
    names = content.get("classes")
    if isinstance(names, list):
        return [printable(str(name)) for name in names]
    listed = _text_beside(shard, "classes.txt")
    return None if listed is None else [printable(line.strip()) for line in listed.strip().splitlines()]


def _classes(parts: Parts, found: dict[str, Index], known: _Known) -> tuple[list[str], dict[int, int]]:
    """Return the class names, and stored number -> position in them."""
    numbers = np.unique(np.concatenate([found[shard.identity].labels for shard in parts["train"]])).tolist()
    names = known.class_names
    if names is None:
        return [str(number) for number in numbers], {number: position for position, number in enumerate(numbers)}
    if numbers and numbers[-1] >= len(names):
        raise DataError(
            f"data=shards: class {numbers[-1]} in the shards, but {len(names)} class names beside them\n"
            "  classes.txt needs a line for each class, counted from 0"
        )
    return names, {number: number for number in range(len(names))}


def _warn_of_sorted(shards: Sequence[Shard], found: dict[str, Index], notes: list[str]) -> None:
    """Say when whole windows can hold a single class, from which a network learns badly."""
    held = [len(np.unique(found[shard.identity].labels)) for shard in shards]
    total = len(np.unique(np.concatenate([found[shard.identity].labels for shard in shards])))
    single = sum(count == 1 for count in held)
    if total > 1 and single > len(held) / 2:
        notes.append(
            f"{single} of {len(held)} training shards hold one class only; all classes should be mixed when shards are "
            "written, as scripts/write-shards does"
        )


def _threads(use: Callable[[Given], Result], items: Sequence[Given], count: int) -> list[Result]:
    pool = ThreadPoolExecutor(count)
    try:
        return list(pool.map(use, items))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
