"""`cvtrain inspect what=aug`: every operation is drawn, the mixtures follow their formulas, the pictures open."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cvtrain import catalog
from cvtrain.inspection.augmentation import ALPHAS, LAMBDAS, cutmix_sweep, mixup_sweep, shipped_operations

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_operation_of_a_shipped_preset_is_known_once():
    targets = [node["_target_"] for _, _, node in shipped_operations()]
    assert len(targets) == len(set(targets))
    mixing = {"cvtrain.aug.Augmentation", "cvtrain.aug.MixUp", "cvtrain.aug.CutMix", "cvtrain.aug.MixUpCutMix"}
    assert set(targets) == {name for name in catalog.shipped_targets() if name.startswith("cvtrain.aug.")} - mixing


def test_mixup_blends_each_pair_by_lambda():
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    for lam, step in zip(LAMBDAS, mixup_sweep(images), strict=True):
        expected = lam * images[0::2].double() + (1 - lam) * images[1::2].double()
        assert np.abs(step - expected.permute(0, 2, 3, 1).numpy()).max() <= 0.51


def test_cutmix_pastes_the_other_picture_and_lambda_is_the_area_that_is_left():
    images = torch.stack([torch.full((3, 20, 20), value, dtype=torch.uint8) for value in (10, 200)])
    found = cutmix_sweep(images, seed=0, count=6)
    assert tuple(found) == ALPHAS
    for pictures, shares in found.values():
        assert len(pictures) == len(shares) == 6
        for picture, share in zip(pictures, shares, strict=True):
            assert set(np.unique(picture)) <= {10, 200}
            assert share == pytest.approx((picture[..., 0] == 10).mean(), abs=1e-6)


def test_the_pictures_are_written_and_listed(cvtrain):
    answer = cvtrain("inspect", "what=aug", "aug=cutmix", "json=true")
    assert answer.code == 0, answer.err
    told = json.loads(answer.last)
    names = {path.name for path in answer.folder.glob("*.png")}
    assert set(told["files"]) == names
    assert {"batch.png", "mixup.png", "cutmix.png", "operations.png", "operation_affine.png"} <= names
    for path in answer.folder.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 200
            assert np.asarray(image.convert("L")).std() > 5, "not one colour"


def test_an_unknown_thing_to_look_at_names_the_choices(cvtrain):
    answer = cvtrain("inspect", "what=augs")
    assert answer.code == 2
    assert "aug" in answer.err
