"""scikit-learn's handwritten digits: real data that needs no download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cvtrain.data.base import DataSet
from cvtrain.data.collection import Collection, Part


@dataclass(kw_only=True)
class Digits(DataSet):
    """1,797 grey pictures of 8 × 8 pixels, 10 classes (UCI Optical Recognition of Handwritten Digits, test part)."""

    def read(self) -> Collection:
        """Return all pictures as one part."""
        # Importing scikit-learn's data sets takes 1.8 s.
        from sklearn.datasets import load_digits

        raw = load_digits()
        pixels = np.round(raw.images * (255.0 / 16.0)).astype(np.uint8)[..., None]
        labels = raw.target.astype(np.int64)
        part = Part(pixels, labels, [str(i) for i in range(len(labels))])
        return Collection("digits", [str(i) for i in range(10)], 1, 8, {"train": part})
