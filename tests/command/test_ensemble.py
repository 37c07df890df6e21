"""`cvtrain val run=[A,B,…]`: finished runs that answer together."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run_cvtrain
from sklearn.metrics import accuracy_score

from cvtrain.aug.views import views
from cvtrain.command.answers import Answers, FinishedRun, answer, open_run
from cvtrain.command.ensemble import (
    Member,
    answer_augmented,
    arranged,
    order_of,
    parse_weights,
    sentence,
    together,
    with_probabilities,
)
from cvtrain.core import weights
from cvtrain.core.artifact import TORCH, Artifact
from cvtrain.core.types import DataSets, Preprocess
from cvtrain.data import ArraySource
from cvtrain.errors import ConfigError, DataError

TINY = (
    "epochs=2",
    "limit_train_batches=12",
    "threads=1",
    "compression=none",
    "export=none",
    "logger=none",
    "json=true",
)
NO_FILE = Artifact("fp32", Path("none"), TORCH, 0, 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A trained run, and two copies whose weights have been shaken."""
    above = tmp_path_factory.mktemp("runs")
    trained = run_cvtrain(above, *TINY)
    assert trained.code == 0, trained.err
    found = [trained.folder]
    for seed in (1, 2):
        copy = Path(shutil.copytree(trained.folder, above / f"shaken{seed}"))
        (copy / "artifacts.csv").unlink(missing_ok=True)  # it knows the hash of the weights
        path = copy / "weights" / "model.safetensors"
        random, (tensors, metadata) = torch.Generator().manual_seed(seed), weights.read(path)
        for tensor in tensors.values():
            if tensor.is_floating_point() and tensor.ndim > 1:
                tensor.add_(0.5 * tensor.std() * torch.randn(tensor.shape, generator=random))
        path.write_bytes(weights.to_bytes(tensors, metadata))
        found.append(copy)
    return found


@pytest.fixture(scope="module")
def opened(folders):
    return [open_run(folder, {"device": "cpu"}, []) for folder in folders]


def loss(labels, probabilities):
    return -np.log(probabilities[np.arange(len(labels)), labels]).mean()


def listed(folders):
    return "run=[" + ",".join(f"'{folder}'" for folder in folders) + "]"


def test_three_runs_answer_together_and_the_table_says_whether_that_is_better(cvtrain, folders, opened):
    told = cvtrain("val", listed(folders), "json=true", "threads=1", "output_dir=here")
    assert told.code == 0, told.err
    given, labels = told.json, opened[0].sets.test.labels
    assert told.folder.parent == Path("here/ensemble_digits").absolute()
    assert json.loads((told.folder / "metrics.json").read_text()) == given
    each = [answer(run, run.artifact("fp32"), "test", 1).probabilities.double().numpy() for run in opened]
    mean = np.mean(each, axis=0)
    rows = list(csv.DictReader((told.folder / "predictions.csv").open()))
    shares = np.array([[float(row[f"p_{name}"]) for name in opened[0].sets.class_names] for row in rows])
    np.testing.assert_allclose(shares, mean, atol=2e-6)
    assert [row["name"] for row in rows] == opened[0].sets.test.names
    assert given["metrics"]["test/acc"] == pytest.approx(accuracy_score(labels, mean.argmax(1)))
    assert given["metrics"]["test/loss"] == pytest.approx(loss(labels, mean), rel=1e-4)
    for member, one in zip(given["members"], each, strict=True):
        assert member["weight"] == pytest.approx(1 / 3)
        assert member["metrics"]["test/acc"] == pytest.approx(accuracy_score(labels, one.argmax(1)))
        assert member["metrics"]["test/loss"] == pytest.approx(loss(labels, one), rel=1e-4)
        low, high = member["intervals_95"]["test/acc"]
        assert low < member["metrics"]["test/acc"] < high
    val = [answer(run, run.artifact("fp32"), "val", 1) for run in opened]
    assert given["best"] == np.argmax([one.correct.mean() for one in val])
    value, low, high = given["differences"]["test/acc"]
    best = given["members"][given["best"]]["metrics"]["test/acc"]
    assert value == pytest.approx(given["metrics"]["test/acc"] - best)
    assert low <= value <= high
    assert given["verdict"] == ("better" if low > 0 else "worse" if high < 0 else "not distinguishable")
    text = " ".join(told.err.split())
    assert "Ensemble (mean), 359 test pictures" in text
    assert f"The ensemble is {given['verdict']}" in text


def test_weights_fitted_on_val_are_never_less_likely_there_than_equal_ones(opened):
    test, val = (
        [answer(run, run.artifact("fp32"), split, 1).calibrated() for run in opened] for split in ("test", "val")
    )
    fitted = together(test, val, *parse_weights("val", 3))
    likely = [
        loss(val[0].labels, np.average([one.probabilities.double() for one in val], axis=0, weights=shares))
        for shares in (fitted.shares, None)
    ]
    assert likely[0] < likely[1] - 1e-3
    expected = np.average([one.probabilities.double() for one in test], axis=0, weights=fitted.shares)
    np.testing.assert_allclose(fitted.ensemble.probabilities, expected, atol=2e-6)
    assert fitted.shares.argmax() == fitted.best == 0  # the others have been shaken
    voted = together(test, val, *parse_weights("vote", 3)).ensemble
    ballots = np.stack([one.decided for one in test])
    agreed = [np.bincount(column).argmax() for column in ballots.T if np.bincount(column).max() > 1]
    assert voted.decided[[np.bincount(column).max() > 1 for column in ballots.T]].tolist() == agreed


def test_artifacts_of_one_run_can_answer_together_with_test_time_augmentation(cvtrain, folders):
    told = cvtrain(
        "val", listed([folders[0]] * 2), "artifact=[fp32,last]", "split=val", "weights=[3,1]", "tta=[hflip,rotate]",
        "threads=1",
    )  # fmt: skip
    assert told.code == 0, told.err
    given = json.loads((Path(told.last) / "metrics.json").read_text())
    assert told.last.startswith(str(Path("outputs/ensemble_digits").absolute()))
    assert [(member["artifact"], member["weight"]) for member in given["members"]] == [("fp32", 0.75), ("last", 0.25)]
    assert f"Ensemble (weighted mean), {given['pictures']} val pictures" in " ".join(told.out.split())
    assert "chosen on val too: split=test says more" in told.out + told.err
    assert (given["weights"], given["tta"]) == ("given", ["hflip", "rotate"])


def test_views_are_answered_by_the_artifact_and_their_probabilities_averaged(opened):
    run = opened[0]
    plain, augmented = answer_augmented(run, run.artifact("fp32"), "val", 1, ["flip"])
    each = [answer(run, run.artifact("fp32"), "val", 1, view).probabilities for view in views(["flip"], 1).values()]
    assert len(each) == 4
    np.testing.assert_allclose(plain.probabilities, each[0], atol=1e-6)
    np.testing.assert_allclose(augmented.probabilities, torch.stack(each).double().mean(0), atol=1e-6)
    assert augmented.seconds > plain.seconds > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["weights=[0.5,0.5]"], "weights=[0.5, 0.5] does not fit 3 runs"),
        (["weights=[0,0,0]"], "or 3 numbers of 0 or more, such as [1,1,1]"),
        (["weights=median"], "allowed: mean, val, vote"),
        (["artifact=[fp32,last]"], "names 2 for 3 runs; give one name for all, or one for each run"),
        (["artifact=int8"], "artifact=int8"),
        (["tta=[color]"], "tta=[color] changes no picture of 1 channel"),
    ],
)
def test_what_does_not_fit_the_runs_is_refused(cvtrain, folders, words, said):
    told = cvtrain("val", listed(folders), *words)
    assert told.code == 2
    assert said in told.err
    assert len(told.err.strip().splitlines()) <= 3


def test_the_same_member_twice_is_refused(cvtrain, folders):
    told = cvtrain("val", listed([folders[0], folders[1], folders[0]]))
    assert told.code == 2
    assert "stands in the ensemble twice with artifact=fp32" in told.err


def test_runs_with_other_pictures_are_refused(cvtrain, folders, tmp_path):
    other = Path(shutil.copytree(folders[1], tmp_path / "other"))
    args = (other / "args.yaml").read_text()
    (other / "args.yaml").write_text(args.replace("split_seed: ", "split_seed: 1"))
    assert (other / "args.yaml").read_text() != args
    told = cvtrain("val", listed([folders[0], other]))
    assert told.code == 2
    assert "their test pictures differ" in told.err
    assert "only in the first" in told.err
    assert "data.split_seed" in told.err


def member(names, labels, class_names):
    """A run of which only the data are needed."""
    source = ArraySource(torch.zeros(len(names), 1, 2, 2, dtype=torch.uint8), np.array(labels), names)
    prepared = Preprocess(2, 2, 1, (0.5,), (0.5,))
    multilabel = np.array(labels).ndim == 2
    sets = DataSets("toy", class_names, prepared, source, source, source, multilabel=multilabel)
    return Member(class_names[0], FinishedRun(Path(class_names[0]), None, sets, [], [], []), NO_FILE)


def said(one, logits):
    source = one.run.sets.test
    return Answers(
        NO_FILE, "test", one.run.sets.class_names, source.names, source.labels, torch.tensor(logits), 1.0, 1.0
    )


def test_a_member_with_other_orders_of_pictures_and_classes_is_brought_into_the_first_ones():
    first = member(["y", "x", "z"], [1, 0, 2], ["cat", "dog", "fish"])
    other = member(["z", "x", "y"], [0, 1, 2], ["fish", "cat", "dog"])
    found = arranged(said(other, [[9.0, 0, 1], [2, 9, 3], [4, 5, 9]]), order_of(first, other, "test"))
    assert found.names == ["y", "x", "z"]
    assert found.class_names == ["cat", "dog", "fish"]
    assert found.labels.tolist() == [1, 0, 2]
    assert found.logits.tolist() == [[5, 9, 4], [9, 3, 2], [0, 1, 9]]
    assert found.correct.all()


def test_the_same_holds_for_several_labels_a_picture():
    first = member(["x", "y"], [[1, 0, 1], [0, 0, 1]], ["sky", "sea", "sand"])
    other = member(["y", "x"], [[1, 0, 0], [1, 1, 0]], ["sand", "sky", "sea"])
    found = arranged(said(other, [[3.0, -1, -2], [4, 5, -6]]), order_of(first, other, "test"))
    assert found.labels.tolist() == [[1, 0, 1], [0, 0, 1]]
    assert found.logits.tolist() == [[5, -6, 4], [-1, -2, 3]]
    assert found.correct.all()
    sure = said(first, [[1.0, -1, 1], [-1, -1, 1]])
    wrong = said(first, [[-4.0, 4, -4], [4, 4, -4]])
    three = [sure, found, wrong]
    mean = np.mean([one.probabilities.double() for one in three], axis=0)
    averaged, voted = (together(three, three, *parse_weights(rule, 3)).ensemble for rule in ("mean", "vote"))
    np.testing.assert_allclose(averaged.probabilities, mean, atol=1e-6)
    assert averaged.decided.tolist() == (mean >= 0.5).astype(int).tolist()
    assert voted.correct.all()
    assert not averaged.correct.all()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            (["x", "y"], [0, 1], ["cat", "cow"]),
            r"classes differ: 1 only in the first \(dog\), 1 only in the second \(cow",
        ),
        (
            (["x", "w"], [0, 1], ["cat", "dog"]),
            r"test pictures differ: 1 only in the first \(y\), 1 only in the second \(w",
        ),
        ((["y", "x"], [0, 1], ["cat", "dog"]), r"2 of their test pictures have other labels, such as x, y"),
        ((["x", "y"], [[1, 0], [0, 1]], ["cat", "dog"]), r"of one a picture has one class, of the other any number"),
    ],
)
def test_members_that_do_not_go_together_are_told_what_differs(other, said):
    with pytest.raises(ConfigError, match=said):
        order_of(member(["x", "y"], [0, 1], ["cat", "dog"]), member(*other), "test")


def test_an_empty_split_is_said_to_be_empty():
    nothing = member([], np.zeros(0, np.int64), ["cat", "dog"])
    with pytest.raises(DataError, match="split=val of run=cat has no pictures"):
        order_of(nothing, nothing, "val")


def test_the_best_by_val_is_compared_with_not_the_best_of_the_split():
    one = member([str(i) for i in range(100)], [0] * 100, ["cat", "dog"])
    right, wrong = [2.0, 0.0], [0.0, 2.0]
    lucky = said(one, [right] * 100)
    usual = said(one, [right] * 60 + [wrong] * 40)
    outcome = together([lucky, usual], [usual, lucky], *parse_weights([0, 1], 2))
    assert outcome.best == 1
    assert outcome.difference.value == 0
    assert outcome.cost == 2
    assert "is not distinguishable from cat, its best member by val: accuracy +0.00 points" in sentence(
        [one, one], outcome
    )
    outcome = together([lucky, usual], [usual, lucky], *parse_weights([1, 0], 2))
    assert "is better than cat, its best member by val: accuracy +40.00 points [95 %: +3" in sentence(
        [one, one], outcome
    )


def test_probabilities_come_back_from_answers_that_were_made_of_them():
    one = member(["x", "y"], [0, 1], ["cat", "dog"])
    answers = said(one, [[0.0, 0.0], [0.0, 0.0]])
    shares = torch.tensor([[0.0, 1.0], [0.3, 0.7]], dtype=torch.float64)
    torch.testing.assert_close(
        with_probabilities(answers, shares, 0.0).probabilities.double(), shares, atol=1e-6, rtol=0
    )
