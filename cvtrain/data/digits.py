"""scikit-learn's handwritten digits: real data that needs no download."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from cvtrain.data.base import DataSet
from cvtrain.data.collection import Collection, Part
from cvtrain.errors import DataError


@dataclass(kw_only=True)
class Digits(DataSet):
    """1,797 grey pictures of 8 × 8 pixels, 10 classes (UCI Optical Recognition of Handwritten Digits, test part)."""

    def read(self) -> Collection:
        """Return all pictures as one part."""
        # The file itself: importing scikit-learn's data sets takes 1.8 s.
        package = find_spec("sklearn")
        if package is None or package.origin is None:
            raise DataError("data=digits is a file of scikit-learn, which is gone: pip install scikit-learn")
        with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz") as file:
            table = np.loadtxt(file, delimiter=",")
        pixels = np.round(table[:, :-1].reshape(-1, 8, 8) * (255.0 / 16.0)).astype(np.uint8)[..., None]
        labels = table[:, -1].astype(np.int64)
        part = Part(pixels, labels, [str(i) for i in range(len(labels))])
        return Collection("digits", [str(i) for i in range(10)], 1, 8, {"train": part})
