"""Class weights in whole runs on a set with 100 pictures of one class for each of the other."""

import numpy as np
import pytest
import torch

from cvtrain.build import Builder
from cvtrain.command.train import build_run
from cvtrain.compose import Composer
from cvtrain.core.types import DataSets, Preprocess
from cvtrain.data import ArraySource
from cvtrain.engine.loop import evaluate_model, fit
from cvtrain.engine.signals import StopRequest

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = [
    "device=cpu",
    "workers=0",
    "logger=none",
    "batch_size=100",
    "epochs=4",
    "optimizer.lr=0.02",
    "aug=none",
    "compression=none",
]


def pictures(counts, seed):
    """A rare picture is a little brighter than a frequent one; the two overlap."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1], counts)
    light = rng.normal(100 + 20 * labels, 8)[:, None, None, None]
    pixels = rng.normal(light, 30, (len(labels), 1, 16, 16)).clip(0, 255).astype(np.uint8)
    return ArraySource(torch.from_numpy(pixels), labels, [str(i) for i in range(len(labels))])


@pytest.fixture(scope="module")
def imbalanced():
    preprocess = Preprocess(16, 16, 1, (0.4,), (0.2,))
    return DataSets(
        "rare",
        ["often", "rare"],
        preprocess,
        *(pictures(n, i) for i, n in enumerate(((2000, 20), (100, 10), (400, 200)))),
    )


def trained(data, folder, *overrides):
    (folder / "weights").mkdir(parents=True)
    builder = Builder(Composer("train", None).check([*QUICK, *overrides], [])[1], [])
    run = build_run(builder, data, torch.device("cpu"), folder, StopRequest())
    fit(run)
    return run, evaluate_model(run, run.model, "test")[0]


@pytest.fixture(scope="module")
def plain(imbalanced, tmp_path_factory):
    torch.set_num_threads(1)
    return trained(imbalanced, tmp_path_factory.mktemp("plain") / "run")[1]


@pytest.mark.parametrize("weights", ["balanced", "effective", "{often: 1, rare: 100}"])
def test_class_weights_find_the_rare_class_that_training_without_them_misses(imbalanced, plain, tmp_path, weights):
    run, weighted = trained(imbalanced, tmp_path / "weighted", f"class_weights={weights}")
    assert float(run.task.class_weights[1] / run.task.class_weights[0]) == pytest.approx(100, rel=0.15)
    assert plain.by_class()["recall"][1] < 0.3
    assert weighted.by_class()["recall"].min() > 0.6  # of both classes, with the smoothed labels of the default


def test_accumulated_micro_batches_train_the_weights_of_the_large_batch(imbalanced, tmp_path):
    options = ("class_weights=balanced", "epochs=1", "limit_train_batches=12", "model=lenet5", "img_size=16")
    parts, _ = trained(imbalanced, tmp_path / "parts", *options, "batch_size=10", "grad_accum_steps=3")
    large, _ = trained(
        imbalanced, tmp_path / "large", *options, "batch_size=30", "grad_accum_steps=1", "limit_train_batches=4"
    )
    assert parts.state.step == large.state.step == 4
    for name, value in large.model.state_dict().items():
        assert torch.allclose(value, parts.model.state_dict()[name], atol=1e-5), name
