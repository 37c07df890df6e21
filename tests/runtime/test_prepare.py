import json

import numpy as np
import pytest
import torch
from artifact_files import described

from cvtrain.core.types import Preprocess
from cvtrain.errors import WeightsError
from cvtrain.runtime.prepare import class_names, preparation, temperature

GREY = Preprocess(8, 8, 1, (0.3,), (0.38,))
COLOUR = Preprocess(6, 9, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("prep", [GREY, COLOUR], ids=["grey", "colour_with_a_margin"])
def test_pictures_are_prepared_to_the_bit_as_training_prepares_them(tmp_path, prep):
    images = np.random.default_rng(0).integers(0, 256, (5, prep.channels, prep.resize, prep.resize), dtype=np.uint8)
    given = preparation(described("ab", prep), tmp_path)(images)
    assert given.dtype == np.float32 and given.flags.c_contiguous
    assert np.array_equal(given, prep(torch.from_numpy(images)).numpy())


@pytest.mark.parametrize(
    "broken",
    [
        {"std": [0.0]},
        {"std": [0.2, 0.2]},
        {"mean": "x"},
        {"img_size": 0},
        {"img_size": 9},
        {"channels": 3},
        {"mean": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_preprocessing_is_refused_with_the_name_of_the_file(tmp_path, broken):
    metadata = {"preprocess": json.dumps({**GREY.to_dict(), **broken})}
    with pytest.raises(WeightsError, match=r"a\.onnx has a damaged preprocessing"):
        preparation(metadata, tmp_path / "a.onnx")


@pytest.mark.parametrize(
    "metadata", [{}, {"class_names": "[", "preprocess": "["}, {"class_names": "3", "preprocess": "3"}]
)
def test_metadata_that_are_missing_or_no_json_are_refused(tmp_path, metadata):
    for read in (preparation, class_names):
        with pytest.raises(WeightsError, match=r"a\.onnx"):
            read(metadata, tmp_path / "a.onnx")


def test_the_temperature_is_one_when_none_is_stored(tmp_path):
    assert temperature({}, tmp_path) == 1.0
    assert temperature({"temperature": "1.75"}, tmp_path) == 1.75


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "warm", ""])
def test_a_temperature_that_is_no_positive_number_is_refused(tmp_path, text):
    with pytest.raises(WeightsError, match="damaged temperature"):
        temperature({"temperature": text}, tmp_path)
