"""Published data sets in their official files, with their official test split: MNIST's family and CIFAR."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cvtrain.data.base import DataSet
from cvtrain.data.collection import Collection, Part
from cvtrain.data.idx import read_idx
from cvtrain.data.pickles import cifar_arrays, read_pickle
from cvtrain.errors import DataError

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


@dataclass(kw_only=True)
class _Published(DataSet):
    """A data set with an official test split; val is carved from the official training split.

    Attributes:
        root: Folder of the files; null means `data/<name>` under the current folder.
        download: Let torchvision download the files into `root` when they are absent.
    """

    name: ClassVar[str]
    torchvision_name: ClassVar[str]
    size: ClassVar[int]
    channels: ClassVar[int]

    root: str | None = None
    download: bool = False

    @property
    def folder(self) -> Path:
        """Return the folder of the files."""
        return Path(self.root) if self.root is not None else Path("data") / self.name

    def read(self) -> Collection:
        """Read the official files; errors as in `DataSet.read`."""
        class_names, train, test = self._read(self._files())
        parts = {}
        for split, (pixels, labels) in (("train", train), ("test", test)):
            parts[split] = Part(pixels, labels, [f"{split}/{i}" for i in range(len(labels))])
        return Collection(self.name, class_names, self.channels, self.size, parts, root=self.folder)

    def _files(self) -> dict[str, Path]:
        """Return the files by role, downloading them when that was asked for and they are absent."""
        found = self._find()
        if found is None and self.download:
            self._fetch()
            found = self._find()
        if found is None:
            raise DataError(
                f"data={self.name}: no data in {self.folder.absolute()}\n"
                f"  expected there: {self._expected()}\n"
                "  give the folder with data.root=DIR, or download it with data.download=true"
            )
        return found

    def _fetch(self) -> None:
        # Slow to import and needed for nothing else.
        from torchvision import datasets

        dataset: Any = getattr(datasets, self.torchvision_name)
        try:
            for train in (True, False):
                dataset(str(self.folder), train=train, download=True)
        # torchvision's downloaders raise a dozen types, from URLError to RuntimeError.
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"data={self.name}: the download into {self.folder.absolute()} failed: {reason}\n"
                f"  put the files there yourself ({self._expected()}) or give their folder with data.root=DIR"
            ) from error

    @abstractmethod
    def _expected(self) -> str:
        """Return the names of the files, for messages."""

    @abstractmethod
    def _find(self) -> dict[str, Path] | None:
        """Return the files by role, None when not all are there."""

    @abstractmethod
    def _read(self, files: dict[str, Path]) -> tuple[list[str], Arrays, Arrays]:
        """Return class names, and pictures uint8 `(N, H, W, C)` with labels `(N,)` for train and test."""


class _Idx(_Published):
    """MNIST and the sets that share its files."""

    size = 28
    channels = 1
    classes: ClassVar[tuple[str, ...]]

    def _expected(self) -> str:
        names = (
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        )
        return ", ".join(names) + ", each plain or .gz"

    def _find(self) -> dict[str, Path] | None:
        for folder in ("", "raw", "MNIST/raw", "FashionMNIST/raw"):
            found = {}
            for part in ("train", "t10k"):
                for role, kind in (("images", "idx3-ubyte"), ("labels", "idx1-ubyte")):
                    # Some mirrors write a dot in place of the last dash.
                    names = [f"{part}-{role}{mark}{kind}{end}" for end in ("", ".gz") for mark in "-."]
                    paths = [path for name in names if (path := self.folder / folder / name).is_file()]
                    if paths:
                        found[f"{part}-{role}"] = paths[0]
            if len(found) == 4:
                return found
        return None

    def _read(self, files: dict[str, Path]) -> tuple[list[str], Arrays, Arrays]:
        arrays = []
        for part in ("train", "t10k"):
            pixels = read_idx(files[f"{part}-images"], dims=3)
            labels = read_idx(files[f"{part}-labels"], dims=1)
            if len(pixels) != len(labels) or pixels.shape[1:] != (self.size, self.size):
                raise DataError(
                    f"{files[f'{part}-images']}: pictures of shape {pixels.shape} for {len(labels)} labels\n"
                    f"  expected one label each and {self.size} × {self.size} pixels; download the files again"
                )
            arrays.append((pixels[..., None], labels.astype(np.int64)))
        return list(self.classes), arrays[0], arrays[1]


class MNIST(_Idx):
    """70,000 grey pictures of handwritten digits, 28 × 28 (LeCun et al. 1998)."""

    name = "mnist"
    torchvision_name = "MNIST"
    classes = tuple(str(i) for i in range(10))


class FashionMNIST(_Idx):
    """70,000 grey pictures of clothes, 28 × 28 (Xiao et al. 2017, arXiv:1708.07747)."""

    name = "fashion_mnist"
    torchvision_name = "FashionMNIST"
    classes = (
        "t-shirt/top",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    )


class _Cifar(_Published):
    """The two CIFAR sets in the files of their python version."""

    size = 32
    channels = 3
    subfolder: ClassVar[str]
    train_files: ClassVar[tuple[str, ...]]
    test_file: ClassVar[str]
    meta_file: ClassVar[str]
    names_key: ClassVar[str]
    label_key: ClassVar[str]

    def _expected(self) -> str:
        return f"{self.subfolder}/ with {', '.join((*self.train_files, self.test_file, self.meta_file))}"

    def _find(self) -> dict[str, Path] | None:
        for folder in (self.folder / self.subfolder, self.folder):
            found = {name: folder / name for name in (*self.train_files, self.test_file, self.meta_file)}
            if all(path.is_file() for path in found.values()):
                return found
        return None

    def _read(self, files: dict[str, Path]) -> tuple[list[str], Arrays, Arrays]:
        names = read_pickle(files[self.meta_file]).get(self.names_key)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{files[self.meta_file]}: no list of texts '{self.names_key}'\n  download it again")
        parts = [cifar_arrays(files[name], self.label_key) for name in self.train_files]
        train = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
        return names, train, cifar_arrays(files[self.test_file], self.label_key)


class CIFAR10(_Cifar):
    """60,000 colour photographs, 32 × 32, 10 classes (Krizhevsky 2009)."""

    name = "cifar10"
    torchvision_name = "CIFAR10"
    subfolder = "cifar-10-batches-py"
    train_files = tuple(f"data_batch_{i}" for i in range(1, 6))
    test_file = "test_batch"
    meta_file = "batches.meta"
    names_key = "label_names"
    label_key = "labels"


class CIFAR100(_Cifar):
    """60,000 colour photographs, 32 × 32, 100 classes (Krizhevsky 2009)."""

    name = "cifar100"
    torchvision_name = "CIFAR100"
    subfolder = "cifar-100-python"
    train_files = ("train",)
    test_file = "test"
    meta_file = "meta"
    names_key = "fine_label_names"
    label_key = "fine_labels"
