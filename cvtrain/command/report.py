"""`cvtrain report run=FOLDER`: all that is known of a run on one page, or several runs side by side."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from cvtrain import catalog, resume, runs
from cvtrain.command.sweep import SWEEP
from cvtrain.compose import Composer, group_choices
from cvtrain.core.files import to_json_line, write_atomic
from cvtrain.core.types import Preprocess, Source
from cvtrain.errors import EXIT_OK, ConfigError, CvtrainError
from cvtrain.evaluation.ensembles import compare
from cvtrain.evaluation.intervals import wilson
from cvtrain.report.charts import Bin
from cvtrain.report.comparison import Compared, comparison, letter, told
from cvtrain.report.console import attach_log, make_console
from cvtrain.report.folder import Predictions, RunFiles, read_run
from cvtrain.report.page import page
from cvtrain.report.sections import ErrorPicture, Findings, Setting

log = logging.getLogger("cvtrain")

PAGE = "report.html"
ERRORS = 12
"""Worst errors that are shown with their pictures."""
BINS = 15
SIDE = 176
"""Pixels a side that such a picture has at most."""
_FLAGS = ("-cd", "--config-dir")

Look = Callable[[RunFiles], list[ErrorPicture]]
"""Finds the pictures of a run's worst errors."""


def run(config: dict[str, Any], trusted: list[str]) -> int:
    """Write the page and print its path; return 0.

    Raises:
        ConfigError: `run` names no run folder.
    """
    folders = _folders(config["run"])
    attach_log(make_console(bool(config["json"])))
    if len(folders) == 1:
        path = write_report(folders[0], functools.partial(_from_data, config=config, trusted=trusted))
    else:
        path = write_comparison(folders, Path(str(config["output_dir"])))
    said = to_json_line({"report": str(path), "runs": [str(folder) for folder in folders], "exit_code": EXIT_OK})
    sys.stdout.write((said if config["json"] else str(path)) + "\n")
    return EXIT_OK


def write_report(folder: Path, look: Look | None = None) -> Path:
    """Write report.html into a run folder and return its path; takes well below a second without `look`.

    Args:
        folder: Of a run, finished or not.
        look: Finds the pictures of the worst errors; None: they are listed without.

    Raises:
        ConfigError: It is no run folder.
        StorageError: The disk is full or read-only.
    """
    read = read_run(folder)
    errors: list[ErrorPicture] = []
    without = ""
    if look is not None and read.predictions is not None and not read.predictions.correct.all():
        try:
            errors = look(read)
        except CvtrainError as error:
            without = f"Without pictures: {str(error).splitlines()[0]}"
    bins, ece = calibration(read.predictions)
    found = Findings(settings_of(read), command_of(read), bins, ece, errors, without)
    path = read.folder / PAGE
    write_atomic(path, page(read, found))
    return path


def refresh(folder: Path, trusted: list[str]) -> None:
    """Write the page of a run again, as something in its folder has changed; a warning where that is not possible."""
    try:
        write_report(folder, functools.partial(_from_data, config={"device": "cpu"}, trusted=trusted))
    except CvtrainError as error:
        log.warning("%s is the old one: %s", folder / PAGE, error)


def write_comparison(folders: Sequence[Path], output_dir: Path) -> Path:
    """Write a page of several runs into a new folder below `output_dir` and return its path.

    Raises:
        ConfigError: One is no run folder.
        StorageError: The disk is full or read-only.
    """
    read = [read_run(folder) for folder in folders]
    reference, how = _reference(read)
    compared = []
    for i, one in enumerate(read):
        verdict, difference = ("reference", None) if i == reference else _judged(one, read[reference])
        compared.append(Compared(one, command_of(one), verdict, difference))
    path = runs.create_folder(output_dir / "report") / PAGE
    write_atomic(path, comparison(compared, how))
    return path


def error_pictures(read: RunFiles, source: Source, model: nn.Module, preprocess: Preprocess) -> list[ErrorPicture]:
    """Return the worst errors with what speaks for each answer (Grad-CAM).

    Args:
        read: The run folder.
        source: The test pictures.
        model: The shipped model, on its device.
        preprocess: Makes its input.

    Raises:
        DataError: A picture can no longer be read.
    """
    from cvtrain.inspection.cam import grad_cam
    from cvtrain.report.grids import enlarged, overlay

    given = read.predictions
    if given is None:
        return []
    places = {name: position for position, name in enumerate(source.names)}
    rows = [row for row in given.worst(ERRORS) if given.names[row] in places]
    if not rows:
        return []
    # Names may occur twice; then the answers' own order decides.
    at = [row if source.names[row : row + 1] == [given.names[row]] else places[given.names[row]] for row in rows]
    images = source.read(np.array(at, np.int64))
    asked = [_asked(given, row, read.class_names) for row in rows]
    device = next(model.parameters()).device
    heat: Tensor | None = None
    try:
        heat = grad_cam(model, preprocess(images.to(device)), torch.tensor(asked, device=device))
    except (CvtrainError, RuntimeError) as error:  # a network of the user's own may have no map, or no gradient
        log.info("report: without Grad-CAM: %s", str(error).splitlines()[0])
    cropped = preprocess.centre_crop(images).permute(0, 2, 3, 1).numpy()
    found = []
    for i, row in enumerate(rows):
        picture = enlarged(cropped[i])
        covered = None
        if heat is not None:
            large = functional.interpolate(heat[i][None, None], picture.shape[:2], mode="bilinear")[0, 0]
            covered = _fitted(overlay(picture, large.numpy()))
        found.append(ErrorPicture(row, _fitted(picture), covered, read.class_names[asked[i]]))
    return found


def _fitted(pixels: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]))
    return image if image.width <= SIDE else image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _asked(given: Predictions, row: int, names: Sequence[str]) -> int:
    """Return the number of the class that was wrongly given; of several labels the first such, or the first missed."""
    said, true = given.predicted[row].split("|"), given.labels[row].split("|")
    wrong = [name for name in (given.predicted[row], *said) if name in names and name not in true]
    missed = [name for name in true if name in names and name not in said]
    return names.index((wrong or missed or [names[0]])[0])


def _from_data(read: RunFiles, config: dict[str, Any], trusted: list[str]) -> list[ErrorPicture]:
    from cvtrain.command import answers, deployed

    opened = answers.open_run(read.folder, config, trusted)
    shipped = deployed.load_file(opened.artifacts[0].path, opened.builder.device(), trusted)
    return error_pictures(read, opened.sets.test, shipped.model, shipped.preprocess)


def _folders(given: Any) -> list[Path]:  # noqa: ANN401 - text or a list of it
    """Return the run folders that `run` names; of a sweep its jobs.

    Raises:
        ConfigError: None is named, or a sweep has no job.
    """
    if given is None:
        raise ConfigError("give run=FOLDER, the folder that a run printed, or run=[A,B] for several side by side.")
    folders = [Path(str(one)) for one in (given if isinstance(given, list) else [given])]
    if len(folders) == 1 and (folders[0] / SWEEP).is_file():
        folders = sorted(path.parent for path in folders[0].glob(f"*/{runs.MANIFEST}"))
        if not folders:
            raise ConfigError(f"run={given} is a sweep of which no job has begun. Give a run's folder.")
    return folders


def calibration(given: Predictions | None) -> tuple[list[Bin], float]:
    """Return the bins of a reliability diagram, and the expected calibration error, 0..1.

    Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015: 15 bins of equal width.
    """
    if given is None or not len(given.stated):
        return [], float("nan")
    places = np.clip((given.stated * BINS).astype(np.int64), 0, BINS - 1)
    bins = []
    for place in range(BINS):
        inside = places == place
        if inside.any():
            count, right = int(inside.sum()), int(given.happened[inside].sum())
            bins.append(Bin(count, float(given.stated[inside].mean()), right / count, *wilson(right, count)))
    total = sum(one.count for one in bins)
    return bins, sum(one.count * abs(one.confidence - one.accuracy) for one in bins) / total


def command_of(read: RunFiles) -> str:
    """Return the command line that makes a run again, quoted for a shell; empty where it is not known."""
    argv = [str(word) for word in read.manifest.get("command", [])[1:]]
    overrides = read.overrides
    if overrides is None:
        overrides = [word for word in argv if "=" in word and not word.startswith("-")]
    flags = [word for flag, value in itertools.pairwise(argv) if flag in _FLAGS for word in (flag, value)]
    kept = [word for word in overrides if not word.startswith(("resume=", "resume_allow=", "json="))]
    return shlex.join(["cvtrain", *flags, *kept]) if argv or read.overrides is not None else ""


def settings_of(read: RunFiles) -> list[Setting] | None:
    """Return what a run's config has other than the defaults: the options of groups, then single values.

    A value is compared with the default of the option that was chosen. None where the defaults cannot be composed.
    """
    try:
        defaults, usual = _composed(())
        found, options = _chosen(read, defaults, usual)
        with contextlib.suppress(ConfigError):  # an option of the user's own
            defaults, _ = _composed(tuple(options))
    except ConfigError:
        return None
    groups = {one.key for one in found}
    return found + [
        Setting(change.key, told(change.new), told(change.old))
        for change in resume.compare(defaults, read.config)
        if change.key not in groups
    ]


@functools.cache
def _composed(overrides: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the config of a training with these overrides, and which option each group has then.

    Raises:
        ConfigError: They do not compose here.
    """
    from hydra import version
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    version.setbase("1.3")
    job, everywhere = HydraConfig.instance(), GlobalHydra.instance()
    before = job.cfg, everywhere.hydra  # those of the training that writes its report
    try:
        composed, config = Composer("train", None).check(list(overrides), [])
        return config, group_choices(composed.hydra.runtime.choices)
    finally:
        job.cfg, everywhere.hydra = before


def _chosen(read: RunFiles, defaults: dict[str, Any], usual: dict[str, str]) -> tuple[list[Setting], list[str]]:
    """Return the groups whose option is not the default one, and overrides that choose the same options."""
    found, options = [], []
    several = [group for group, option in catalog.defaults().items() if option.startswith("[")]
    for group, option in {str(k): str(v) for k, v in read.manifest.get("choices", {}).items()}.items():
        if option != usual.get(group, option):
            found.append(Setting(group, option, usual[group]))
        if group not in ("experiment", "debug", *several):  # what these set is told key by key
            options.append(f"{group}={option}")
    for group in several:
        now, default = list(read.config.get(group, {})), list(defaults.get(group, {}))
        if now != default:
            found.append(Setting(group, ", ".join(now) or "none", ", ".join(default) or "none"))
        options.append(f"{group}=[{','.join(now)}]" if now else f"{group}=none")
    return found, options


def _reference(read: Sequence[RunFiles]) -> tuple[int, str]:
    """Return the run that the others are compared with, and a sentence that says why it is this one."""
    for metric, words in (
        ("val/acc", "on the validation set"),
        ("test/acc", "on the test set, which flatters it a little"),
    ):
        values = [one.metrics.get(metric, float("nan")) for one in read]
        if np.isfinite(values).all():
            best = int(np.argmax(values))
            return best, f"The reference is {letter(best)}, the most accurate {words}."
    return 0, "The reference is A, the first; not all of these runs have come to their end."


def _judged(one: RunFiles, reference: RunFiles) -> tuple[str, tuple[float, float, float] | None]:
    """Return in words, and in numbers where there are any, how a run stands to the reference."""
    ours, theirs = one.predictions, reference.predictions
    if ours is None or theirs is None or not len(ours.correct):
        return "no predictions.csv", None
    if ours.names != theirs.names or ours.labels != theirs.labels:
        return "other test pictures", None
    difference = compare(ours.correct, theirs.correct)
    return difference.verdict, (difference.value, difference.low, difference.high)
