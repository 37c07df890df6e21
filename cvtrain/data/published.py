"""Published data sets in their official files, with their official test split: MNIST's family, CIFAR, SVHN, STL-10."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cvtrain.data.base import DataSet
from cvtrain.data.collection import Collection, Part
from cvtrain.data.idx import read_idx
from cvtrain.data.official import Downloadable, read_mat
from cvtrain.data.pickles import cifar_arrays, read_pickle
from cvtrain.errors import DataError

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


@dataclass(kw_only=True)
class _Published(Downloadable, DataSet):
    """Arrays with an official test split; val is carved from the official training split."""

    size: ClassVar[int]
    channels: ClassVar[int]

    def read(self) -> Collection:
        """Read the official files; errors as in `DataSet.read`."""
        class_names, train, test = self._read(self._files())
        parts = {}
        for split, (pixels, labels) in (("train", train), ("test", test)):
            parts[split] = Part(pixels, labels, [f"{split}/{i}" for i in range(len(labels))])
        notes = [f"official splits: {len(train[1])} train, {len(test[1])} test"]
        return Collection(self.name, class_names, self.channels, self.size, parts, notes)

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
    names_key: ClassVar[str]
    label_key: ClassVar[str]

    def _read(self, files: dict[str, Path]) -> tuple[list[str], Arrays, Arrays]:
        *train_files, test_file, meta_file = (files[name] for name in self.needed)
        names = read_pickle(meta_file).get(self.names_key)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{meta_file}: no list of texts '{self.names_key}'\n  download it again")
        parts = [cifar_arrays(path, self.label_key) for path in train_files]
        train = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
        return names, train, cifar_arrays(test_file, self.label_key)


class CIFAR10(_Cifar):
    """60,000 colour photographs, 32 × 32, 10 classes (Krizhevsky 2009)."""

    name = "cifar10"
    torchvision_name = "CIFAR10"
    subfolders = ("cifar-10-batches-py", "")
    needed = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
    names_key = "label_names"
    label_key = "labels"


class CIFAR100(_Cifar):
    """60,000 colour photographs, 32 × 32, 100 classes (Krizhevsky 2009)."""

    name = "cifar100"
    torchvision_name = "CIFAR100"
    subfolders = ("cifar-100-python", "")
    needed = ("train", "test", "meta")
    names_key = "fine_label_names"
    label_key = "fine_labels"


class SVHN(_Published):
    """99,289 colour photographs of house numbers, 32 × 32, cropped to a digit (Netzer et al. 2011).

    The 531,131 easier pictures of the `extra` file are not used.
    """

    name = "svhn"
    torchvision_name = "SVHN"
    torchvision_splits = ({"split": "train"}, {"split": "test"})
    needed = ("train_32x32.mat", "test_32x32.mat")
    size = 32
    channels = 3

    def _read(self, files: dict[str, Path]) -> tuple[list[str], Arrays, Arrays]:
        train, test = (self._arrays(files[name]) for name in self.needed)
        return [str(i) for i in range(10)], train, test

    def _arrays(self, path: Path) -> Arrays:
        pixels, numbers = read_mat(path, "X", "y")
        labels = numbers.reshape(-1).astype(np.int64)
        if pixels.dtype != np.uint8 or pixels.shape != (32, 32, 3, len(labels)):
            raise DataError(
                f"{path}: pictures of shape {pixels.shape} for {len(labels)} labels\n"
                "  expected (32, 32, 3, N) bytes and N labels; download the file again"
            )
        # The digit 0 is stored as 10.
        return np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)), np.where(labels == 10, 0, labels)


class STL10(_Published):
    """13,000 labelled colour photographs, 96 × 96, 10 classes (Coates et al. 2011).

    The 100,000 unlabelled pictures and the ten predefined folds of 1,000 training pictures are not used.
    """

    name = "stl10"
    torchvision_name = "STL10"
    torchvision_splits = ({"split": "train"}, {"split": "test"})
    subfolders = ("stl10_binary", "")
    needed = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
    size = 96
    channels = 3

    def _read(self, files: dict[str, Path]) -> tuple[list[str], Arrays, Arrays]:
        names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
        train, test = (self._arrays(files[f"{part}_X.bin"], files[f"{part}_y.bin"]) for part in ("train", "test"))
        return names, train, test

    def _arrays(self, pictures: Path, classes: Path) -> Arrays:
        try:
            pixels, labels = np.fromfile(pictures, np.uint8), np.fromfile(classes, np.uint8)
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror or error}\n  download it again") from error
        side = self.size
        if len(pixels) != len(labels) * 3 * side * side:
            raise DataError(
                f"{pictures}: {len(pixels)} bytes for {len(labels)} labels\n"
                f"  expected {3 * side * side} bytes a picture; download both files again"
            )
        # Planes of columns, as MATLAB writes them; classes count from 1.
        rows = np.ascontiguousarray(pixels.reshape(-1, 3, side, side).transpose(0, 3, 2, 1))
        return rows, labels.astype(np.int64) - 1
