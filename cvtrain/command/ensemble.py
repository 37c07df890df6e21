"""`cvtrain val run=[A,B,…]`: finished runs that answer together, and whether that beats the best of them."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from cvtrain import runs
from cvtrain.aug.views import View, answer_views, views
from cvtrain.command.answers import Answers, FinishedRun, answer, open_run
from cvtrain.command.results import Evaluation, write_evaluation
from cvtrain.core.artifact import Artifact
from cvtrain.core.files import to_json_line, write_json
from cvtrain.core.metrics import measured
from cvtrain.errors import EXIT_OK, ConfigError, DataError
from cvtrain.evaluation.calibration import to_logits
from cvtrain.evaluation.ensembles import Difference, average, compare, fit_weights, vote
from cvtrain.evaluation.scores import Scores, difference
from cvtrain.report.console import attach_log, make_console
from cvtrain.report.scores import ScoreRow, scores_table

log = logging.getLogger("cvtrain")

MEAN, VAL, VOTE, GIVEN = "mean", "val", "vote", "given"
RULES = (MEAN, VAL, VOTE)
SHOWN = 3
"""Pictures or classes that a message names."""


@dataclass(frozen=True)
class Member:
    """One of those that answer together.

    Attributes:
        label: Its run and artifact, short and like no other member's.
        run: The finished run.
        artifact: The artifact of it that answers.
    """

    label: str
    run: FinishedRun
    artifact: Artifact


@dataclass(frozen=True)
class Order:
    """Where a member has what the first member has at each position.

    Attributes:
        rows: `(N,)` positions of the pictures.
        columns: `(K,)` positions of the classes.
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]

    def relabelled(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the member's labels, `(N,)` or `(N, K)`, in the first one's order and numbers."""
        own = labels[self.rows]
        return own[:, self.columns] if own.ndim == 2 else np.argsort(self.columns)[own]


@dataclass(frozen=True)
class Outcome:
    """What came of an ensemble.

    Attributes:
        rule: How it is weighted: one of `RULES`, or `GIVEN`.
        shares: `(M,)` of sum 1, the weights.
        members: What each says, calibrated, in the first one's order.
        ensemble: What they say together.
        best: The member that is best on val.
        difference: Of the accuracies of the ensemble and of that member.
    """

    rule: str
    shares: NDArray[np.float64]
    members: Sequence[Answers]
    ensemble: Answers
    best: int
    difference: Difference

    @property
    def cost(self) -> float:
        """Return how many times the time of the best member the ensemble takes."""
        return self.ensemble.seconds / max(1e-9, self.members[self.best].seconds)


def run_ensemble(config: dict[str, Any], trusted: list[str]) -> int:
    """Measure runs together; print table, verdict and the folder with metrics.json and predictions.csv; return 0.

    Args:
        config: Of `val`: `run` (a list), `artifact` (a name, or one a run), `split`, `weights` (`mean`, `val`, `vote`,
            or a number a run), `tta`, `device`, `threads`, `output_dir`, `json`.
        trusted: The user's own packages.

    Raises:
        ConfigError: The runs cannot answer together, or a key does not fit them.
        DataError: Their data are gone, or hold no pictures to measure.
        WeightsError: An artifact is missing or damaged.
    """
    console = make_console(bool(config["json"]))
    attach_log(console)
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    split, (rule, shares) = config["split"], parse_weights(config["weights"], len(config["run"]))
    members = members_of(config, trusted)
    orders: list[Order | None] = [order_of(members[0], member, split) for member in members]
    # Where no weights are fitted there, they may have been validated on other pictures, like the folds of a data set.
    val_orders = [order_of(members[0], member, VAL) if rule == VAL else None for member in members]
    answered = [_answers(one, split, order, config) for one, order in zip(members, orders, strict=True)]
    judged = answered
    if split != VAL:
        judged = [_answers(one, VAL, order, config) for one, order in zip(members, val_orders, strict=True)]
    outcome = together(answered, judged, rule, shares)
    evaluations = [one.evaluation(members[0].run) for one in (*outcome.members, outcome.ensemble)]
    console.print(_table(members, outcome, [one.scores for one in evaluations]))
    console.print(sentence(members, outcome), markup=False)
    if split == VAL:
        log.warning("the best member, and weights=val, are chosen on val too: split=test says more")
    told = _written(members, outcome, evaluations, config)
    sys.stdout.write((to_json_line(told) if config["json"] else str(told["run"])) + "\n")
    return EXIT_OK


def together(answered: Sequence[Answers], judged: Sequence[Answers], rule: str, shares: NDArray[np.float64]) -> Outcome:
    """Let members answer together, and compare that with the best of them.

    Args:
        answered: What each says of the split, calibrated, all in one order.
        judged: What each says of val; in one order too where the weights are fitted there.
        rule: One of `RULES`, or `GIVEN`.
        shares: `(M,)` of sum 1: the weights, which `VAL` fits anew and `VOTE` has no use for.
    """
    said = [one.probabilities for one in answered]
    if rule == VAL:
        shares = fit_weights([one.probabilities for one in judged], judged[0].labels)
    mixed = vote(said, answered[0].multilabel) if rule == VOTE else average(said, shares)
    ensemble = with_probabilities(answered[0], mixed, math.fsum(one.seconds for one in answered))
    found = [measured(one.logits, torch.from_numpy(one.labels)).compute() for one in judged]
    best = min(range(len(found)), key=lambda i: (-found[i]["acc"], found[i]["loss"]))
    return Outcome(rule, shares, answered, ensemble, best, compare(ensemble.correct, answered[best].correct))


def sentence(members: Sequence[Member], outcome: Outcome) -> str:
    """Say whether the ensemble beats its best member, and what it costs."""
    verdict = outcome.difference.verdict
    verb = f"{verdict} than" if verdict in ("better", "worse") else f"{verdict} from"
    return (
        f"The ensemble is {verb} {members[outcome.best].label}, its best member by val: accuracy {outcome.difference}; "
        f"it takes {outcome.cost:.1f}× the time."
    )


def _table(members: Sequence[Member], outcome: Outcome, scores: Sequence[Scores]) -> Table:
    """Return a row for each member, and the last for the ensemble."""
    names = [
        member.label + f"\nweight {share:.3g}" * (outcome.rule != VOTE)
        for member, share in zip(members, outcome.shares.tolist(), strict=True)
    ]
    names[outcome.best] = f"★ {names[outcome.best]}"
    rows = []
    for name, answers, found in zip([*names, "ensemble"], (*outcome.members, outcome.ensemble), scores, strict=True):
        best = outcome.members[outcome.best]
        change = None if answers is best else compare(answers.correct, best.correct)
        rows.append(ScoreRow(name, found.values, found.intervals, answers.seconds, change))
    how = {MEAN: "mean", VAL: "mean weighted by val", VOTE: "vote", GIVEN: "weighted mean"}[outcome.rule]
    pictures = f"{len(outcome.ensemble.labels):,} {outcome.ensemble.split} pictures"
    return scores_table(f"Ensemble ({how}), {pictures}, 95 % intervals; ★ the best by val; Δ: against it, paired", rows)


def _written(
    members: Sequence[Member], outcome: Outcome, evaluations: Sequence[Evaluation], config: dict[str, Any]
) -> dict[str, Any]:
    """Write the ensemble's folder; return what is in its metrics.json."""
    first, answers = members[0].run, outcome.ensemble
    above = "outputs" if config["output_dir"] == "auto" else str(config["output_dir"])
    folder = runs.create_folder(Path(above) / f"ensemble_{first.sets.name}")
    scores, best = evaluations[-1].scores, evaluations[outcome.best].scores
    rows = [
        {"run": str(member.run.folder), "artifact": member.artifact.name, "weight": share, "seconds": one.seconds}
        for member, share, one in zip(members, outcome.shares.tolist(), outcome.members, strict=True)
    ]
    told = {
        "run": str(folder),
        "status": "done",
        "exit_code": EXIT_OK,
        "split": answers.split,
        "pictures": len(answers.labels),
        "tta": config["tta"],
        "weights": outcome.rule,
        "members": [row | _told(one) for row, one in zip(rows, evaluations[:-1], strict=True)],
        **_told(evaluations[-1]),
        "seconds": answers.seconds,
        "cost": outcome.cost,
        "best": outcome.best,
        "differences": {f"{answers.split}/{name}": difference(scores, best, name) for name in _metrics(scores)},
        "verdict": outcome.difference.verdict,
    }
    write_json(folder / "metrics.json", told)
    write_evaluation(folder, evaluations[-1])
    return told


def _told(evaluation: Evaluation) -> dict[str, Any]:
    scores, split = evaluation.scores, evaluation.split
    return {
        "metrics": {f"{split}/{name}": scores.values[name] for name in _metrics(scores)},
        "intervals_95": {f"{split}/{name}": scores.intervals.get(name) for name in _metrics(scores)},
    }


def _metrics(scores: Scores) -> list[str]:
    """Return the metrics without the one of probabilities before their temperature, which these have had already."""
    return [name for name in scores.values if name != "ece_uncalibrated"]


def members_of(config: dict[str, Any], trusted: list[str]) -> list[Member]:
    """Take up the runs that `config["run"]` lists, each folder once.

    Raises:
        ConfigError: Not one artifact a run, or one that is not there; the same member twice; a folder without a run.
        DataError: The data are gone, or have other classes than the model.
        WeightsError: The weights are missing or damaged.
    """
    folders, named = [Path(str(folder)).resolve() for folder in config["run"]], config["artifact"]
    names = [str(name) for name in named] if isinstance(named, list) else [str(named)] * len(folders)
    if len(names) != len(folders):
        raise ConfigError(
            f"artifact={named} names {len(names)} for {len(folders)} runs; give one name for all, or one for each run."
        )
    pairs = list(zip(folders, names, strict=True))
    for folder, name in pairs:
        if pairs.count((folder, name)) > 1:
            raise ConfigError(f"run={folder} stands in the ensemble twice with artifact={name}; leave one of them out.")
    opened = {folder: open_run(folder, config, trusted) for folder in dict.fromkeys(folders)}
    above = os.path.commonpath([folder.parent for folder in folders])
    return [
        Member(f"{os.path.relpath(folder, above)} {name}", opened[folder], opened[folder].artifact(name))
        for folder, name in pairs
    ]


def order_of(first: Member, other: Member, split: str) -> Order:
    """Return where `other` has the pictures and classes of `first`.

    Raises:
        ConfigError: They have not the same classes, or not the same pictures with the same labels.
        DataError: The split is empty.
    """
    ours, theirs = first.run.source(split), other.run.source(split)
    classes, own = first.run.sets.class_names, other.run.sets.class_names
    if not len(ours):
        raise DataError(f"split={split} of run={first.run.folder} has no pictures.")
    if first.run.sets.multilabel != other.run.sets.multilabel:
        raise _refused(first, other, "of one a picture has one class, of the other any number of labels")
    if sorted(own) != sorted(classes):
        raise _refused(first, other, f"their classes differ: {_apart(classes, own)}")
    if sorted(theirs.names) != sorted(ours.names):
        raise _refused(first, other, f"their {split} pictures differ: {_apart(ours.names, theirs.names)}")
    rows, columns = np.empty(len(ours), dtype=np.int64), np.array([own.index(name) for name in classes])
    rows[_sorted(ours.names)] = _sorted(theirs.names)
    order = Order(rows, columns)
    labels = order.relabelled(theirs.labels)
    wrong = np.flatnonzero((labels != ours.labels).reshape(len(labels), -1).any(1))
    if len(wrong):
        some = ", ".join(ours.names[i] for i in wrong[:SHOWN])
        raise _refused(first, other, f"{len(wrong)} of their {split} pictures have other labels, such as {some}")
    return order


def _sorted(names: Sequence[str]) -> list[int]:
    return sorted(range(len(names)), key=names.__getitem__)


def _apart(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """Say in words what only one of them has."""
    parts = []
    for which, here, there in (("first", Counter(ours), Counter(theirs)), ("second", Counter(theirs), Counter(ours))):
        only = sorted((here - there).elements())
        if only:
            more = ", …" if len(only) > SHOWN else ""
            parts.append(f"{len(only)} only in the {which} ({', '.join(only[:SHOWN])}{more})")
    return ", ".join(parts)


def _refused(first: Member, other: Member, what: str) -> ConfigError:
    return ConfigError(
        f"run={first.run.folder} and run={other.run.folder} cannot answer together:\n  {what}.\n"
        "  Give runs with the same classes and the same split of the same data (data.split_seed, data.fold)."
    )


def _answers(member: Member, split: str, order: Order | None, config: dict[str, Any]) -> Answers:
    """Return what a member says, calibrated, so that its temperature is 1; by `order` where there is one."""
    threads = config["threads"] or torch.get_num_threads()
    looks = config["tta"]
    if looks == "none":
        given = answer(member.run, member.artifact, split, threads).calibrated()
    else:
        names = looks if isinstance(looks, list) else [looks]
        given = answer_augmented(member.run, member.artifact, split, threads, names)[1]
    return given if order is None else arranged(given, order)


def arranged(answers: Answers, order: Order) -> Answers:
    """Return a member's answers with pictures and classes in the first one's order."""
    return dataclasses.replace(
        answers,
        class_names=[answers.class_names[k] for k in order.columns],
        names=[answers.names[i] for i in order.rows],
        labels=order.relabelled(answers.labels),
        logits=answers.logits[order.rows][:, order.columns],
    )


def answer_augmented(
    run: FinishedRun, artifact: Artifact, split: str, threads: int, names: Sequence[str]
) -> tuple[Answers, Answers]:
    """Let an artifact answer a split through several views, and return what it says without and with them.

    Args:
        run: The run.
        artifact: One of its artifacts.
        split: `train`, `val` or `test`.
        threads: CPU threads inside one operator.
        names: Of `aug.views.VIEWS`.

    Returns:
        The answers to the pictures as they are, and the mean of the calibrated probabilities over all views, whose
        `seconds` are those of all.

    Raises:
        ConfigError: A view that is not known, or none that changes these pictures.
        DataError: A picture cannot be read, or the file has other classes than the run.
        WeightsError: The file is missing or damaged.
    """
    plain: list[Answers] = []
    seconds = 0.0

    def through(view: View) -> Tensor:
        nonlocal seconds
        given = answer(run, artifact, split, threads, view)
        seconds += given.seconds
        if not plain:
            plain.append(given)
        return given.probabilities

    mean = answer_views(through, views(names, run.sets.preprocess.channels))
    return plain[0], with_probabilities(plain[0], mean, seconds)


def with_probabilities(answers: Answers, probabilities: Tensor, seconds: float) -> Answers:
    """Return answers to the same pictures that come to other calibrated probabilities `(N, K)`, at temperature 1."""
    logits = to_logits(probabilities, 1.0, answers.multilabel).float()
    return dataclasses.replace(answers, logits=logits, temperature=1.0, seconds=seconds)


def parse_weights(given: object, count: int) -> tuple[str, NDArray[np.float64]]:
    """Return the rule by which `count` members are weighted, and weights of sum 1: those given, or all the same.

    Raises:
        ConfigError: It is none of `RULES`, and no list of as many numbers of 0 or more, one of them above 0.
    """
    if isinstance(given, str) and given in RULES:
        return given, np.full(count, 1 / count)
    if isinstance(given, list) and all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in given):
        shares = np.array(given, dtype=np.float64)
        if len(shares) == count and np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0:
            return GIVEN, shares / shares.sum()
    raise ConfigError(
        f"weights={given} does not fit {count} runs.\n"
        f"  allowed: {', '.join(RULES)}, or {count} numbers of 0 or more, such as [{','.join(['1'] * count)}]"
    )
