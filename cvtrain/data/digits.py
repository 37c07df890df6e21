"""scikit-learn's handwritten digits: real data that needs no download."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cvtrain.core.types import DataSets
from cvtrain.data.source import array_source
from cvtrain.data.splits import checked, fraction, input_size, measured, per_channel, preprocessing, stratified


class Digits:
    """1,797 grey pictures of 8 × 8 pixels, 10 classes (UCI Optical Recognition of Handwritten Digits, test part).

    Args:
        val_fraction: Share of all pictures for val.
        test_fraction: Share of all pictures for test.
        split_seed: Seed of the stratified split; not the run's seed, so that runs with other seeds stay comparable.
        mean: Mean, in 0..1; None measures it on the training part.
        std: Standard deviation, in 0..1; None measures it on the training part.

    Attributes:
        splits: After `load`, the names in each split.
    """

    def __init__(
        self,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.fractions = (fraction("val_fraction", val_fraction), fraction("test_fraction", test_fraction))
        self.split_seed = int(split_seed)
        self.mean = per_channel("mean", mean)
        self.std = per_channel("std", std)
        self.splits: dict[str, list[str]] = {}

    def load(self, img_size: int | None, eval_resize: float, workers: int) -> DataSets:
        """Return the data set.

        Args:
            img_size: Side the model sees, in pixels; None means 8.
            eval_resize: Side that is read, as a multiple of `img_size`.
            workers: Threads that resize.
        """
        # Importing scikit-learn's data sets takes 1.8 s.
        from sklearn.datasets import load_digits

        raw = load_digits()
        size, resize = input_size(8, img_size, eval_resize)
        pixels = np.round(raw.images * (255.0 / 16.0)).astype(np.uint8)[..., None]
        labels = raw.target.astype(np.int64)
        parts = dict(zip(("train", "val", "test"), stratified(labels, self.fractions, self.split_seed), strict=True))
        self.splits = {split: [str(i) for i in part] for split, part in parts.items()}
        sources = {
            split: array_source(pixels[part], labels[part], self.splits[split], resize, workers)
            for split, part in parts.items()
        }
        mean, std = measured(pixels[parts["train"]])
        return checked(
            DataSets(
                name="digits",
                class_names=[str(i) for i in range(10)],
                preprocess=preprocessing((size, resize, 1), self.mean or mean, self.std or std),
                train=sources["train"],
                val=sources["val"],
                test=sources["test"],
                notes=[f"one set split by ratio, stratified, data.split_seed={self.split_seed}"],
            )
        )
