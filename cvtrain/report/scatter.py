"""Pictures of samples as points in the plane, with the names of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from cvtrain.report.grids import shortened
from cvtrain.report.plots import INK, PALETTE, save

mpl.use("Agg")
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

MARKERS = "os^Dv"
NEIGHBOURS = 6
"""Classes around one that get another colour than it."""
SEEDS, TRIED = 40_000, 400
"""Places that a name may move to, and how many are tried at once."""

Points = NDArray[np.float64]


def classes(
    places: Points, labels: NDArray[np.int64], wrong: NDArray[np.bool_], names: Sequence[str], title: str, path: Path
) -> None:
    """Draw points, each class in a colour and a mark that its neighbours do not have, named at its middle.

    Args:
        places: `(N, 2)`.
        labels: `(N,)` class numbers.
        wrong: `(N,)`: answers to mark as wrong.
        names: K names; those without a point are not written.
        title: Above all.
        path: The `.png` file.
    """
    present = np.unique(labels)
    centres = np.stack([np.median(places[labels == k], axis=0) for k in present])
    styles = _styles(centres)
    many = len(present) > len(PALETTE) * 2
    figure = Figure(figsize=(10, 9.2) if many else (8, 7.2))
    FigureCanvasAgg(figure)
    axis = figure.add_axes((0.02, 0.02, 0.96, 0.9))
    size = float(np.clip(9000 / max(1, len(labels)), 10, 42))
    for k, (colour, mark) in zip(present, styles, strict=True):
        of_class = labels == k
        axis.scatter(
            places[of_class, 0], places[of_class, 1], s=size, color=colour, marker=mark, alpha=0.65, linewidths=0
        )
    if wrong.any():
        axis.scatter(places[wrong, 0], places[wrong, 1], s=1.5 * size, color=INK, marker="x", linewidths=1.1)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.margins(0.06)
    for spine in axis.spines.values():
        spine.set_color("#c8ced4")
    figure.text(0.02, 0.975, title, va="top", fontsize=12.5, weight="bold", color=INK)
    said = f"{len(labels):,} pictures, {len(present)} classes; the name and mark of each at its middle"
    figure.text(0.02, 0.942, said, va="top", fontsize=9, color="#5b6570")
    if wrong.any():
        key = Line2D([], [], ls="none", marker="x", color=INK, mew=1.1, label=f"wrong answer ({int(wrong.sum()):,})")
        figure.legend(handles=[key], loc="upper right", bbox_to_anchor=(0.985, 0.955), frameon=False, fontsize=9)
    texts = [shortened(names[k], 24) for k in present]
    _name(figure, axis, centres, texts, styles, 7 if many else 10.5)
    save(figure, path)


def _styles(centres: Points) -> list[tuple[str, str]]:
    """Return colour and mark of each class: of its nearest classes none has the same colour, if there are enough."""
    found: list[tuple[str, str]] = []
    used: dict[str, int] = dict.fromkeys(PALETTE, 0)
    for i, centre in enumerate(centres):
        near = np.argsort(((centres[:i] - centre) ** 2).sum(1))[:NEIGHBOURS]
        taken = {found[j][0] for j in near}
        free = [colour for colour in PALETTE if colour not in taken]
        colour = min(free, key=lambda each: used[each])
        found.append((colour, MARKERS[used[colour] % len(MARKERS)]))
        used[colour] += 1
    return found


def _name(
    figure: Figure, axis: Axes, centres: Points, texts: Sequence[str], styles: Sequence[tuple[str, str]], size: float
) -> None:
    """Write a name at each centre behind its class's mark, moved as far as needed to keep clear of the others.

    A name that was moved has a line to its centre.
    """
    halo = [withStroke(linewidth=2.6, foreground="white")]
    written = [
        axis.annotate(
            *(f"   {text}", (0, 0)),
            fontsize=size, ha="center", va="center", color=INK, weight="bold", zorder=6, path_effects=halo,
        )
        for text in texts
    ]  # fmt: skip
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined] # of the Agg canvas
    boxes = [text.get_window_extent(renderer) for text in written]
    sizes = np.array([(box.width + 6, box.height + 3) for box in boxes])
    frame = axis.get_window_extent(renderer)
    wanted = axis.transData.transform(centres)
    found = spread(wanted, sizes, np.array([[frame.x0, frame.y0], [frame.x1, frame.y1]]))
    back = axis.transData.inverted()
    marks = back.transform(found - np.stack([(sizes[:, 0] - sizes[:, 1]) / 2, np.zeros(len(sizes))], 1))
    moved = (np.abs(found - wanted) > sizes / 2).any(1)
    for i, (text, place, (colour, mark)) in enumerate(zip(written, back.transform(found), styles, strict=True)):
        text.set_position(tuple(place))
        axis.scatter(
            marks[i, 0],
            marks[i, 1],
            s=0.45 * size**2,
            color=colour,
            marker=mark,
            zorder=7,
            edgecolors=INK,
            linewidths=0.8,
        )
        if moved[i]:
            axis.plot(*zip(place, centres[i], strict=True), color=colour, lw=1, zorder=5)


def spread(wanted: Points, sizes: Points, bounds: Points) -> Points:
    """Move boxes apart so that none lies on another; those in the middle stay, those further out give way.

    Each takes the free place nearest to where it is wanted, of places on a sunflower's spiral around there.

    Args:
        wanted: `(n, 2)` middles.
        sizes: `(n, 2)` widths and heights.
        bounds: `(2, 2)` lowest and highest corner of the frame that all boxes stay in.

    Returns:
        `(n, 2)` middles; where the frame is full a box stays on others.
    """
    steps = np.arange(SEEDS)
    turns = steps * 2.399963  # the golden angle
    spiral = sizes[:, 1].min() / 3 * np.sqrt(steps)[:, None] * np.stack([np.cos(turns), np.sin(turns)], 1)
    low, high = bounds[0] + sizes / 2, bounds[1] - sizes / 2
    found = np.clip(wanted, low, high)
    placed: list[int] = []
    for i in np.argsort(((wanted - wanted.mean(0)) ** 2).sum(1)).tolist():
        needed = (sizes[placed] + sizes[i]) / 2
        for first in range(0, SEEDS, TRIED):
            tried = np.clip(found[i] + spiral[first : first + TRIED], low[i], high[i])
            free = np.flatnonzero((np.abs(tried[:, None] - found[placed]) >= needed).any(2).all(1))
            if len(free):
                found[i] = tried[free[0]]
                break
        placed.append(i)
    return found
