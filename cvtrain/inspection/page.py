"""The page of a check: one HTML file that needs nothing else, neither network nor script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from PIL import Image

from cvtrain.core import html
from cvtrain.inspection.findings import Duplicates, Findings
from cvtrain.inspection.views import SPLITS, thumbnail

GROUPS_SHOWN = 30
"""Groups of duplicates of each section that the page shows with their pictures; check.json has all."""
_PICTURES_SHOWN = 8
_LINES_SHOWN = 200
_CLASSES_SHOWN = 200
_SIDE = 112


def page(title: str, found: Findings, batch: Sequence[tuple[Image.Image, Image.Image, str]]) -> str:
    """Return the page.

    Args:
        title: What was checked.
        found: What the check found.
        batch: Training pictures before and after the augmentation, and their labels.
    """
    name = escape(title)
    sections = [
        _unreadable(found),
        _groups(found, "Leaks between splits", "leaks", found.leaks, "No picture is in two splits."),
        _groups(
            found, "One picture, two labels", "conflicts", [g for g in found.conflicts if not g.leak],
            "No group of duplicates within a split has different labels.",
        ),
        _groups(
            found, "Duplicates within a split", "duplicates", [g for g in found.within if not g.conflict],
            "No picture is in a split twice.",
        ),
        _classes(found),
        _sizes(found),
        _channels(found),
        _batch(batch),
    ]  # fmt: skip
    body = f"<header>\n<h1>{name}</h1>\n{_verdict(found)}\n</header>\n<main>\n" + "\n".join(sections) + "\n</main>"
    return html.document(f"check: {title}", body, html.asset("cvtrain.inspection", "page.css"))


def _verdict(found: Findings) -> str:
    problems = [
        _counted(len(found.unreadable), "unreadable picture"),
        _counted(len(found.leaks), "leak") + " between splits" * bool(found.leaks),
        _counted(len(found.conflicts), "conflict") + " of labels" * bool(found.conflicts),
    ]
    tone = "bad" if found.failed else "good"
    words = ", ".join(problem for problem in problems if not problem.startswith("no "))
    counts = found.sets.counts()
    tiles = [*((split, str(counts[split])) for split in SPLITS), ("classes", str(found.sets.num_classes))]
    return (
        f'<p class="verdict {tone}">{escape(words[:1].upper() + words[1:] or "Nothing that stops a training")}.</p>\n'
        + html.tiles(tiles)
    )


def _counted(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'s' * (count != 1)}"


def _unreadable(found: Findings) -> str:
    if not found.unreadable:
        return html.section("Unreadable pictures", "unreadable", "<p>Every picture can be read.</p>")
    rows = [line.rpartition(": ")[::2] for line in found.unreadable[:_LINES_SHOWN]]
    more = len(found.unreadable) - len(rows)
    note = f"<p>{more} more are in check.json.</p>" if more > 0 else ""
    return html.section("Unreadable pictures", "unreadable", html.table(("picture", "reason"), rows) + note)


def _groups(found: Findings, title: str, anchor: str, groups: Sequence[Duplicates], none: str) -> str:
    if not groups:
        return html.section(title, anchor, f"<p>{none}</p>")
    body = f'<div class="groups">{"".join(_group(found, group) for group in groups[:GROUPS_SHOWN])}</div>'
    more = len(groups) - GROUPS_SHOWN
    note = f"<p>{more} more groups are in check.json.</p>" if more > 0 else ""
    return html.section(f"{title}: {len(groups)}", anchor, body + note)


def _group(found: Findings, duplicates: Duplicates) -> str:
    rows = duplicates.group.rows
    figures = []
    for row in rows[:_PICTURES_SHOWN]:
        picture = found.picture(row)
        text = f"{picture['split']}: {picture['name']}, {picture['label']}"
        caption = f"<b>{picture['split']}</b> {escape(picture['label'])}<br>{escape(picture['name'])}"
        figures.append(_figure(thumbnail(found.sets, found.views, row, _SIDE), text, caption))
    more = f"<p>and {len(rows) - _PICTURES_SHOWN} more</p>" if len(rows) > _PICTURES_SHOWN else ""
    flag = " · different labels" if duplicates.conflict else ""
    head = f"<h3>{escape(duplicates.title)}{flag}</h3>"
    return f'<div>{head}<div class="pictures">{"".join(figures)}</div>{more}</div>\n'


def _classes(found: Findings) -> str:
    largest = max((max(counts.values()) for counts in found.classes.values()), default=0) or 1
    rows = []
    for name, counts in list(found.classes.items())[:_CLASSES_SHOWN]:
        bars = "".join(
            f'<span class="bar {split}" style="width:{100 * counts[split] / largest:.2f}%"></span>' for split in SPLITS
        )
        numbers = "".join(f"<td class=n>{counts[split]}</td>" for split in SPLITS)
        rows.append(f'<tr><th scope="row">{escape(name)}</th><td class="bars">{bars}</td>{numbers}</tr>')
    heads = "".join(f'<th scope="col" class="n {split}">{split}</th>' for split in SPLITS)
    more = len(found.classes) - len(rows)
    note = f"<p>{more} more classes are in check.json.</p>" if more > 0 else ""
    return html.section(
        "Pictures of each class", "classes",
        f'<div class="wide"><table><thead><tr><th scope="col">class</th><th class="bars"></th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}",
    )  # fmt: skip


def _sizes(found: Findings) -> str:
    sizes = found.sizes
    heads = ("", "smallest", "5 %", "median", "95 %", "largest")
    keys = ("min", "q05", "median", "q95", "max")
    rows = [(f"{what} (px)", *(f"{sizes[what][key]:g}" for key in keys)) for what in ("width", "height")]
    rows.append(("width / height", *(f"{sizes['aspect'][key]:.2f}" for key in keys)))
    whose = "" if found.views.content else "As the model reads them. "
    common = ", ".join(f"{size['width']} × {size['height']} ({size['count']})" for size in sizes["common"])
    return html.section(
        "Sizes",
        "sizes",
        html.table(heads, rows, "numbers") + f"<p>{whose}{sizes['different']} different; most frequent: {common}.</p>",
    )


def _channels(found: Findings) -> str:
    names = ("red", "green", "blue") if len(found.channels) == 3 else tuple(map(str, range(len(found.channels))))
    names = ("grey",) if len(found.channels) == 1 else names
    heads = ("channel", "mean", "set to", "std", "set to", "black", "white")
    keys = ("mean", "configured_mean", "std", "configured_std")
    rows = [
        (name, *(f"{channel[key]:.4f}" for key in keys), *(f"{channel[key]:.1%}" for key in ("black", "white")))
        for name, channel in zip(names, found.channels, strict=True)
    ]
    text = "<p>Of the training pictures as the model reads them, in 0..1.</p>"
    return html.section("Channels", "channels", text + html.table(heads, rows, "numbers"))


def _batch(batch: Sequence[tuple[Image.Image, Image.Image, str]]) -> str:
    figures = "".join(
        _figure(before, f"a training picture of {label}", f"{escape(label)}<br>as read")
        + _figure(after, f"the same picture of {label}, augmented", "augmented")
        for before, after, label in batch
    )
    return html.section("An augmented batch", "augmented", f'<div class="pictures">{figures}</div>')


def _figure(image: Image.Image, text: str, caption: str) -> str:
    return f"<figure>{html.picture(image, text)}<figcaption>{caption}</figcaption></figure>"
