"""`cvtrain check data=folder data.root=DIR`: what is wrong with a data set, before it is trained on."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cvtrain import runs
from cvtrain.build import Builder
from cvtrain.core.files import to_json_line, write_atomic, write_json
from cvtrain.core.types import DataSets
from cvtrain.data.picture import MAX_PIXELS
from cvtrain.errors import EXIT_OK, DataError
from cvtrain.inspection.duplicates import search
from cvtrain.inspection.findings import Duplicates, Findings, findings
from cvtrain.inspection.page import page
from cvtrain.inspection.views import SPLITS, label_names, look, shown
from cvtrain.report.console import attach_log, make_console

log = logging.getLogger("cvtrain")

LINES = 20
"""Files or groups of each kind that the terminal shows; check.json has all."""
_TOLERANT = {"on_error": "skip", "max_bad": 1.0, "allow_empty": True}
_BATCH = 16
_SIDE = 112


def run(config: dict[str, Any], trusted: list[str]) -> int:
    """Print, write check.json and check.html, and return 3 when a file is unreadable or splits share a picture, else 0.

    Raises:
        DataError: There is no data set to check.
    """
    console = make_console(bool(config["json"]))
    attach_log(console)
    sets = _load(config, trusted)
    batch = _augmented(Builder(config, trusted), sets)
    folder = runs.create_folder(Path(str(config["output_dir"])) / f"check_{sets.name}")
    for note in sets.notes:
        log.info("data: %s", note)
    log.info("check: looking at %d pictures", sum(len(getattr(sets, split)) for split in SPLITS))
    views = look(sets, config["workers"], int(config["data"].get("max_pixels", MAX_PIXELS)))
    found = findings(sets, views, search(views, config["near"]))
    code = DataError.exit_code if found.failed else EXIT_OK
    told = {"run": str(folder), "exit_code": code, **found.to_dict()}
    write_json(folder / "check.json", told)
    write_atomic(folder / "check.html", page(f"{sets.name} {config['data'].get('root') or ''}".strip(), found, batch))
    report(found, console)
    sys.stdout.write((to_json_line(told) if config["json"] else str(folder / "check.html")) + "\n")
    return code


def _load(config: dict[str, Any], trusted: list[str]) -> DataSets:
    """Load the data set without what cannot be read, so that everything is listed at once."""
    known = {key: value for key, value in _TOLERANT.items() if key in config["data"]}
    tolerant = {**config, "model": {}, "data": {**config["data"], **known}}
    try:
        sets, _ = Builder(tolerant, trusted).data()
    except DataError:
        # Where nothing is left, the unreadable files are the better answer.
        Builder({**config, "model": {}}, trusted).data()
        raise
    return sets


def _augmented(builder: Builder, sets: DataSets) -> list[tuple[Image.Image, Image.Image, str]]:
    """Return training pictures before and after the augmentation, spread over the split, with their labels."""
    count = min(_BATCH, len(sets.train))
    indices = np.linspace(0, len(sets.train) - 1, count).round().astype(np.int64)
    before = sets.train.read(indices)
    augmentation = builder.augmentation(sets.preprocess)
    after = augmentation.samples(before.clone(), indices, builder.config["seed"], 0, sets.preprocess.img_size)
    names = label_names(sets.train, sets.class_names)
    images = [[shown(image, _SIDE) for image in batch.permute(0, 2, 3, 1).numpy()] for batch in (before, after)]
    return list(zip(*images, [names[index] for index in indices], strict=True))


def report(found: Findings, console: Console) -> None:
    """Print the findings."""
    for line in found.unreadable[:LINES]:
        console.print(f"unreadable  {escape(line)}", style="red")
    _more(len(found.unreadable), "unreadable pictures", console)
    leaks, conflicts = found.leaks, [group for group in found.conflicts if not group.leak]
    others = [group for group in found.within if not group.conflict]
    for title, style, groups in (
        ("leak", "red", leaks), ("two labels", "yellow", conflicts), ("duplicate", "dim", others),
    ):  # fmt: skip
        for group in groups[:LINES]:
            console.print(f"{title:<12}{escape(_line(found, group))}", style=style)
        _more(len(groups), f"groups of this kind ({title})", console)
    console.print(_class_table(found))
    console.print(_channel_table(found))
    sizes, whose = found.sizes, "sizes" if found.views.content else "sizes as read"
    console.print(
        f"{whose}: {sizes['width']['min']:g} to {sizes['width']['max']:g} × {sizes['height']['min']:g} to "
        f"{sizes['height']['max']:g} px, median {sizes['width']['median']:g} × {sizes['height']['median']:g}, "
        f"width / height {sizes['aspect']['min']:.2f} to {sizes['aspect']['max']:.2f}"
    )
    if found.flat:
        console.print(f"{found.flat} nearly uniform picture(s) were compared by their pixels only", style="dim")
    console.print(
        f"unreadable {len(found.unreadable)}, leaks {len(leaks)}, groups of different labels {len(found.conflicts)}, "
        f"groups of duplicates within a split {len(found.within)}",
        style="bold red" if found.failed else "bold green",
    )


def _more(count: int, what: str, console: Console) -> None:
    if count > LINES:
        console.print(f"… {count} {what} in all; check.json lists them", style="dim")


def _line(found: Findings, group: Duplicates) -> str:
    pictures = [found.picture(row) for row in group.group.rows]
    shown_ones = ", ".join(f"{one['split']}:{one['name']} [{one['label']}]" for one in pictures[:4])
    return f"{group.title}: {shown_ones}" + (f" and {len(pictures) - 4} more" if len(pictures) > 4 else "")


def _class_table(found: Findings) -> Table:
    table = Table(title="Pictures of each class", title_justify="left", title_style="bold", header_style="bold")
    table.add_column("class")
    for split in SPLITS:
        table.add_column(split, justify="right")
    for name, counts in list(found.classes.items())[:LINES]:
        table.add_row(escape(name), *(str(counts[split]) for split in SPLITS))
    totals = found.sets.counts()
    hidden = f" of {len(found.classes)} classes" if len(found.classes) > LINES else ""
    table.add_row(f"all{hidden}", *(str(totals[split]) for split in SPLITS), style="bold")
    return table


def _channel_table(found: Findings) -> Table:
    table = Table(title="Channels of train, 0..1", title_justify="left", title_style="bold", header_style="bold")
    for name in ("mean", "set to", "std", "set to", "black", "white"):
        table.add_column(name, justify="right")
    for channel in found.channels:
        numbers = [f"{channel[key]:.4f}" for key in ("mean", "configured_mean", "std", "configured_std")]
        table.add_row(*numbers, *(f"{channel[key]:.1%}" for key in ("black", "white")))
    return table
