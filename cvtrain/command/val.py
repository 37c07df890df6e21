"""`cvtrain val run=FOLDER`: measure a finished run again, from its files."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cvtrain.command.answers import Answers, FinishedRun, answer, open_run
from cvtrain.command.ensemble import answer_augmented, run_ensemble
from cvtrain.command.results import write_csv, write_evaluation
from cvtrain.core.artifact import Artifact
from cvtrain.core.files import storage_error, to_json_line, write_json
from cvtrain.errors import EXIT_OK, ConfigError, CvtrainError
from cvtrain.evaluation.scores import Scores, difference
from cvtrain.report.console import attach_log, make_console
from cvtrain.report.scores import ScoreRow, scores_table

log = logging.getLogger("cvtrain")

ALL, AUTO, NO_VIEWS = "all", "auto", "none"


@dataclass(frozen=True)
class Measured:
    """What an artifact has said, with or without test-time augmentation.

    Attributes:
        name: Of its row.
        answers: Its answers.
        scores: How good they are.
        folder: Where its files went; None: nowhere.
    """

    name: str
    answers: Answers
    scores: Scores
    folder: Path | None = None

    def report(self, split: str) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "artifact": self.answers.artifact.name,
            "name": self.name,
            "pictures": len(self.answers.labels),
            "temperature": self.answers.temperature,
            "seconds": self.answers.seconds,
            "metrics": {f"{split}/{name}": value for name, value in self.scores.values.items()},
            "intervals_95": {f"{split}/{name}": bounds for name, bounds in self.scores.intervals.items()},
            "folder": None if self.folder is None else str(self.folder),
        }


def run(config: dict[str, Any], trusted: list[str]) -> int:
    """Measure artifacts on one split, write their files, print the metrics; return the exit code.

    Raises:
        ConfigError: It is no run, or has no such artifact.
        DataError: The data are gone, or their classes are not those that the model was trained on.
        WeightsError: A file is missing or damaged.
    """
    given = config["run"]
    if given is None:
        raise ConfigError("give run=FOLDER, the folder that a run printed; run=[FOLDER,FOLDER] makes an ensemble.")
    if isinstance(given, list) and len(given) > 1:
        return run_ensemble(config, trusted)
    console = make_console(bool(config["json"]))
    attach_log(console)
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    folder = Path(str(given[0] if isinstance(given, list) else given)).absolute()
    taken, split = open_run(folder, config, trusted), config["split"]
    output = folder / "val" if config["output_dir"] == AUTO else Path(str(config["output_dir"])).absolute()
    chosen = _chosen(taken, config["artifact"])
    found: list[Measured] = []
    failures: list[CvtrainError] = []
    for artifact in chosen:
        try:
            found += _measure(taken, artifact, config, output)
        except CvtrainError as error:
            if len(chosen) == 1:
                raise
            log.warning("%s: %s", artifact.name, error)
            failures.append(error)
    if not found:
        raise failures[0]
    if len(found) == 1:
        place, told = found[0].folder, _lines(found[0], split)
    else:
        place, told = output, _compared(found, split, output)
        title = f"{len(found[0].answers.labels):,} {split} pictures, 95 % intervals; Δ: against {found[0].name}, paired"
        console.print(scores_table(title, [_row(one, found[0]) for one in found]))
    if config["json"]:
        rows = [one.report(split) for one in found]
        best = next(row for row in rows if row["folder"])
        sys.stdout.write(to_json_line({"run": str(folder), "split": split, **best, "artifacts": rows}) + "\n")
    else:
        sys.stdout.write("\n".join([*told, str(place)]) + "\n")
    return failures[0].exit_code if failures else EXIT_OK


def _chosen(taken: FinishedRun, given: str | list[str]) -> list[Artifact]:
    """Return the artifacts that `artifact=` names."""
    if given == ALL:
        return list(taken.artifacts)
    return [taken.artifact(str(name)) for name in (given if isinstance(given, list) else [given])]


def _measure(taken: FinishedRun, artifact: Artifact, config: dict[str, Any], output: Path) -> list[Measured]:
    """Return one row, or with test-time augmentation two: without and with it; the last one's files are written."""
    split, looks = config["split"], config["tta"]
    threads = config["threads"] or torch.get_num_threads()
    place = output / f"{split}_{artifact.name}{'_tta' * (looks != NO_VIEWS)}"
    rows = []
    if looks == NO_VIEWS:
        answers, name = answer(taken, artifact, split, threads), artifact.name
    else:
        names = looks if isinstance(looks, list) else [looks]
        plain, answers = answer_augmented(taken, artifact, split, threads, names)
        # Calibrated, as the mean of the probabilities is: else the two would be at different temperatures.
        rows.append(Measured(artifact.name, plain, plain.calibrated().evaluation(taken).scores))
        name = f"{artifact.name} + {', '.join(names)}"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(place, error) from error
    evaluation = answers.evaluation(taken)
    write_evaluation(place, evaluation)
    measured = Measured(name, answers, evaluation.scores, place)
    about = {"run": str(taken.folder), "split": split, "tta": looks}
    write_json(place / "metrics.json", {**about, **measured.report(split)})
    return [*rows, measured]


def _lines(measured: Measured, split: str) -> list[str]:
    """Return the metrics of one artifact as text, one a line."""
    scores, answers = measured.scores, measured.answers
    lines = []
    for name, value in scores.values.items():
        bounds = scores.intervals.get(name)
        shown = f"  [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else ""
        lines.append(f"{f'{split}/{name}':<24}{value:.4f}{shown}")
    before, after = scores.values["ece_uncalibrated"], scores.values["ece"]
    measure = "exact match" if answers.multilabel else "accuracy"
    low, high = scores.intervals["acc"]
    return [
        *lines,
        f"{measured.name}: {measure} {100 * scores.values['acc']:.2f} %, 95 % [{100 * low:.2f}, {100 * high:.2f}] "
        f"on {len(answers.labels):,} pictures",
        f"calibration error {before:.4f} before, {after:.4f} at the temperature {answers.temperature:.3g}",
    ]


def _row(measured: Measured, first: Measured) -> ScoreRow:
    change = None if measured is first else difference(measured.scores, first.scores, "acc")
    told = None if change is None else (change.value, change.low, change.high)
    scores = measured.scores
    return ScoreRow(measured.name, scores.values, scores.intervals, measured.answers.seconds, told)


def _compared(found: Sequence[Measured], split: str, output: Path) -> list[str]:
    """Write all metrics of several rows with their differences to the first; say what test-time augmentation gives."""
    first, table = found[0], []
    for one in found:
        for name, value in one.scores.values.items():
            low, high = one.scores.intervals.get(name, ("", ""))
            row: dict[str, object] = {"artifact": one.name, "metric": name, "value": value, "low": low, "high": high}
            change = None if one is first else difference(one.scores, first.scores, name)
            if change is not None:
                row |= {"difference": change.value, "difference_low": change.low, "difference_high": change.high}
            table.append(row)
    write_csv(output / f"{split}_compared{'_tta' * (first.folder is None)}.csv", table)
    lines = []
    for plain, augmented in itertools.pairwise(found):
        if plain.folder is None:
            change = difference(augmented.scores, plain.scores, "acc")
            cost = augmented.answers.seconds / plain.answers.seconds
            verdict = "" if change is None else f"{change}, {change.verdict}"
            lines.append(f"{augmented.name}: {verdict}; {cost:.1f} × the time")
    return lines
