"""Published data sets of photographs of any size, in their official files and splits."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from cvtrain.data.base import EncodedDataSet
from cvtrain.data.collection import Collection, Files, Part
from cvtrain.data.official import Downloadable, Official, read_mat
from cvtrain.data.picture import printable
from cvtrain.errors import DataError

NATIVE_SIZE = 224
AGAIN = "it is damaged or another file; download it again"

Labelled = list[tuple[str, int]]
"""Paths relative to a folder, with class numbers."""

# In the order of the class numbers, http://www.robots.ox.ac.uk/~vgg/data/flowers/102/categories.html
FLOWERS = """
pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid, bird
of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, yellow iris, globe-flower,
purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire lily, pincushion flower, fritillary, red
ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke, sweet william, carnation,
garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped cattleya, cape flower, great masterwort,
siam tulip, lenten rose, barbeton daisy, daffodil, sword lily, poinsettia, bolero deep blue, wallflower, marigold,
buttercup, oxeye daisy, common dandelion, petunia, wild pansy, primula, sunflower, pelargonium, bishop of llandaff,
gaura, geranium, orange dahlia, pink-yellow dahlia?, cautleya spicata, japanese anemone, black-eyed susan, silverbush,
californian poppy, osteospermum, spring crocus, bearded iris, windflower, tree poppy, gazania, azalea, water lily,
rose, thorn apple, morning glory, passion flower, lotus, toad lily, anthurium, frangipani, clematis, hibiscus,
columbine, desert-rose, tree mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, ball moss,
foxglove, bougainvillea, camellia, mallow, mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily
"""


@dataclass(kw_only=True)
class _Photographs(Official, EncodedDataSet):
    """Pictures in files of their own."""

    def _collected(self, class_names: list[str], folder: Path, splits: dict[str, Labelled], note: str) -> Collection:
        parts = {}
        for split, rows in splits.items():
            paths = [path for path, _ in rows]
            labels = np.array([number for _, number in rows], np.int64)
            parts[split] = Part(Files(os.fspath(folder), paths), labels, [printable(path) for path in paths])
        return Collection(self.name, class_names, self.channels, NATIVE_SIZE, parts, [note])


@dataclass(kw_only=True)
class Flowers102(_Photographs, Downloadable):
    """8,189 photographs of flowers, 102 classes (Nilsback & Zisserman 2008)."""

    name: ClassVar[str] = "flowers102"
    torchvision_name: ClassVar[str] = "Flowers102"
    torchvision_splits = ({"split": "train"},)
    subfolders: ClassVar[tuple[str, ...]] = ("flowers-102", "")
    needed: ClassVar[tuple[str, ...]] = ("jpg/", "imagelabels.mat", "setid.mat")

    def read(self) -> Collection:
        """Read the official labels and splits; errors as in `DataSet.read`."""
        files = self._files()
        labels = read_mat(files["imagelabels.mat"], "labels")[0].reshape(-1).astype(np.int64) - 1
        parts = {}
        roles = ("trnid", "valid", "tstid")
        for split, ids in zip(("train", "val", "test"), read_mat(files["setid.mat"], *roles), strict=True):
            numbers = ids.reshape(-1).astype(np.int64)
            if len(numbers) == 0 or numbers.min() < 1 or numbers.max() > len(labels):
                raise DataError(f"{files['setid.mat']}: picture numbers beyond the {len(labels)} labels\n  {AGAIN}")
            parts[split] = [(f"image_{number:05d}.jpg", int(labels[number - 1])) for number in numbers.tolist()]
        names = " ".join(FLOWERS.split()).split(", ")
        counts = ", ".join(f"{len(rows)} {split}" for split, rows in parts.items())
        return self._collected(names, files["jpg/"], parts, f"official splits: {counts}")


@dataclass(kw_only=True)
class OxfordPet(_Photographs, Downloadable):
    """7,349 photographs of cats and dogs, 37 breeds (Parkhi et al. 2012)."""

    name: ClassVar[str] = "oxford_pet"
    torchvision_name: ClassVar[str] = "OxfordIIITPet"
    torchvision_splits = ({"split": "trainval"},)
    subfolders: ClassVar[tuple[str, ...]] = ("oxford-iiit-pet", "")
    needed: ClassVar[tuple[str, ...]] = ("images/", "annotations/trainval.txt", "annotations/test.txt")

    def read(self) -> Collection:
        """Read the official lists; errors as in `DataSet.read`."""
        files = self._files()
        breeds: dict[int, str] = {}
        parts = {
            split: self._listed(files[f"annotations/{name}.txt"], breeds)
            for split, name in (("train", "trainval"), ("test", "test"))
        }
        if sorted(breeds) != list(range(len(breeds))):
            raise DataError(f"{files['annotations/trainval.txt']}: class numbers with gaps\n  {AGAIN}")
        note = f"official splits: {len(parts['train'])} trainval, {len(parts['test'])} test"
        return self._collected([breeds[number] for number in sorted(breeds)], files["images/"], parts, note)

    def _listed(self, path: Path, breeds: dict[int, str]) -> Labelled:
        rows = []
        for line, text in enumerate(_text(path).splitlines(), start=1):
            words = text.split()
            if not words or text.startswith("#"):
                continue
            if len(words) < 2 or not words[1].isdecimal():
                raise DataError(f"{path}: line {line} is not 'NAME CLASS …': {text[:80]!r}\n  {AGAIN}")
            number, breed = int(words[1]) - 1, words[0].rpartition("_")[0].replace("_", " ")
            if breeds.setdefault(number, breed) != breed:
                raise DataError(f"{path}: line {line} gives {breed} the number of {breeds[number]}\n  {AGAIN}")
            rows.append((f"{words[0]}.jpg", number))
        return rows


@dataclass(kw_only=True)
class Food101(_Photographs, Downloadable):
    """101,000 photographs of dishes, 101 classes (Bossard et al. 2014)."""

    name: ClassVar[str] = "food101"
    torchvision_name: ClassVar[str] = "Food101"
    torchvision_splits = ({"split": "train"},)
    subfolders: ClassVar[tuple[str, ...]] = ("food-101", "")
    needed: ClassVar[tuple[str, ...]] = ("images/", "meta/train.json", "meta/test.json")

    def read(self) -> Collection:
        """Read the official lists; errors as in `DataSet.read`."""
        files = self._files()
        listed = {split: self._listed(files[f"meta/{split}.json"]) for split in ("train", "test")}
        classes = sorted(listed["train"])
        strange = sorted(set(listed["test"]) - set(classes))
        if strange:
            raise DataError(f"{files['meta/test.json']}: class {strange[0]!r} is not in train.json\n  {AGAIN}")
        numbers = {name: number for number, name in enumerate(classes)}
        parts = {
            split: [(f"{path}.jpg", numbers[name]) for name, paths in content.items() for path in paths]
            for split, content in listed.items()
        }
        note = f"official splits: {len(parts['train'])} train, {len(parts['test'])} test"
        names = [name.replace("_", " ") for name in classes]
        return self._collected(names, files["images/"], parts, note)

    def _listed(self, path: Path) -> dict[str, list[str]]:
        try:
            content = json.loads(_text(path))
        except ValueError as error:
            raise DataError(f"{path}: {error}\n  {AGAIN}") from error
        if not isinstance(content, dict) or not all(
            isinstance(paths, list) and all(isinstance(name, str) for name in paths) for paths in content.values()
        ):
            raise DataError(f"{path}: not a list of pictures for each class\n  {AGAIN}")
        return content


@dataclass(kw_only=True)
class ImageNet(_Photographs):
    """1,281,167 training and 50,000 validation photographs, 1000 classes (Russakovsky et al. 2015, arXiv:1409.0575).

    The labels of the official test pictures are not public, so the official validation pictures are the test here.
    """

    name: ClassVar[str] = "imagenet"
    needed: ClassVar[tuple[str, ...]] = ("train/", "val/")
    fix: ClassVar[str] = "register at https://image-net.org to download it, and give the folder with data.root=DIR"

    def read(self) -> Collection:
        """Find the pictures; errors as in `DataSet.read`."""
        files = self._files()
        found = {split: _pictures(files[f"{folder}/"]) for split, folder in (("train", "train"), ("test", "val"))}
        wnids = sorted({wnid for wnid, _ in found["train"]})
        strange = sorted({wnid for wnid, _ in found["test"]} - set(wnids))
        if strange:
            raise DataError(
                f"data=imagenet: class {strange[0]} is in val but not in train\n"
                f"  train has {len(wnids)} classes; add it there or remove it"
            )
        numbers = {wnid: number for number, wnid in enumerate(wnids)}
        parts = {
            split: [(f"{'val' if split == 'test' else split}/{path}", numbers[wnid]) for wnid, path in rows]
            for split, rows in found.items()
        }
        note = (
            f"the {len(parts['test'])} official validation pictures are the test, and val comes from the "
            f"{len(parts['train'])} of training: the labels of the official test are not public"
        )
        return self._collected(_readable(self.folder, wnids), self.folder, parts, note)

    def _expected(self) -> str:
        return "train/nXXXXXXXX/*.JPEG and val/nXXXXXXXX/*.JPEG; for readable class names LOC_synset_mapping.txt"


def _pictures(folder: Path) -> list[tuple[str, str]]:
    """Return (wnid, wnid/file) of all pictures below, sorted."""
    rows = []
    with os.scandir(folder) as entries:
        wnids = sorted(entry.name for entry in entries if re.fullmatch(r"n\d{8}", entry.name) and entry.is_dir())
    for wnid in wnids:
        with os.scandir(folder / wnid) as entries:
            names = sorted(e.name for e in entries if e.name.lower().endswith((".jpeg", ".jpg")) and e.name[0] != ".")
        rows += [(wnid, f"{wnid}/{name}") for name in names]
    if not rows:
        raise DataError(
            f"data=imagenet: {folder.absolute()} holds no pictures in folders named by class, such as n01440764\n"
            "  move each picture into the folder of its class"
        )
    return rows


def _readable(folder: Path, wnids: Sequence[str]) -> list[str]:
    """Return the first word of each class in Kaggle's list, with its number where two classes share it."""
    mapping = folder / "LOC_synset_mapping.txt"
    if not mapping.is_file():
        return list(wnids)
    pairs = (line.partition(" ") for line in _text(mapping).splitlines())
    words = {wnid: text.partition(",")[0].strip() for wnid, _, text in pairs}
    names = [words.get(wnid) or wnid for wnid in wnids]
    return [f"{name} ({wnid})" if names.count(name) > 1 else name for name, wnid in zip(names, wnids, strict=True)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}\n  {AGAIN}") from error
