"""What a check found, as data: for JSON, for the terminal and for the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cvtrain.core.types import DataSets
from cvtrain.inspection.duplicates import Found, Group
from cvtrain.inspection.statistics import channel_statistics, histogram, size_statistics
from cvtrain.inspection.views import SPLITS, Views

_KINDS = {"bytes": "same bytes", "pixels": "same pixels", "near": "nearly the same"}


@dataclass(frozen=True)
class Duplicates:
    """A group of duplicates and what is wrong with it.

    Attributes:
        group: The pictures.
        leak: Whether it reaches over two splits or more.
        conflict: Whether its pictures have different labels.
    """

    group: Group
    leak: bool
    conflict: bool

    @property
    def title(self) -> str:
        """Return in words how alike the pictures are."""
        alike = f" (residual {self.group.residual:.3f})" if self.group.kind == "near" else ""
        return _KINDS[self.group.kind] + alike


@dataclass(frozen=True)
class Findings:
    """What a check found.

    Attributes:
        sets: The data set.
        views: A look at each picture.
        duplicates: Groups: leaks first, then conflicts of labels, then the others; exact ones before near ones.
        flat: Pictures too uniform for the near search.
        classes: Class -> split -> count.
        sizes: See `size_statistics`.
        channels: See `channel_statistics`.
    """

    sets: DataSets
    views: Views
    duplicates: list[Duplicates]
    flat: int
    classes: dict[str, dict[str, int]]
    sizes: dict[str, Any]
    channels: list[dict[str, float]]

    @property
    def unreadable(self) -> list[str]:
        """Return `place: reason` of each picture that cannot be read."""
        return self.sets.bad

    @property
    def leaks(self) -> list[Duplicates]:
        """Return the groups that reach over two splits."""
        return [found for found in self.duplicates if found.leak]

    @property
    def conflicts(self) -> list[Duplicates]:
        """Return the groups of different labels."""
        return [found for found in self.duplicates if found.conflict]

    @property
    def within(self) -> list[Duplicates]:
        """Return the groups inside one split."""
        return [found for found in self.duplicates if not found.leak]

    @property
    def failed(self) -> bool:
        """Return whether training on this data would stop, or its test would not be one."""
        return bool(self.unreadable or self.leaks)

    def picture(self, row: int) -> dict[str, str]:
        """Return split, name and label of a picture."""
        views = self.views
        return {"split": SPLITS[int(views.splits[row])], "name": views.names[row], "label": views.labels[row]}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "data": self.sets.name,
            "failed": self.failed,
            "counts": self.sets.counts(),
            "unreadable": self.unreadable,
            "leaks": len(self.leaks),
            "label_conflicts": len(self.conflicts),
            "duplicates": [
                {
                    "kind": found.group.kind,
                    "residual": round(found.group.residual, 4),
                    "leak": found.leak,
                    "label_conflict": found.conflict,
                    "pictures": [self.picture(row) for row in found.group.rows],
                }
                for found in self.duplicates
            ],
            "too_uniform_to_compare": self.flat,
            "classes": self.classes,
            "sizes": self.sizes,
            "channels": self.channels,
            "notes": self.sets.notes,
        }


def findings(sets: DataSets, views: Views, found: Found) -> Findings:
    """Put together what was found.

    Args:
        sets: The data set; its training pictures are read once more for the statistics.
        views: Looks at all its pictures.
        found: Their duplicates.
    """
    judged = []
    for group in found.groups:
        splits = {int(views.splits[row]) for row in group.rows}
        labels = {views.labels[row] for row in group.rows}
        judged.append(Duplicates(group, len(splits) > 1, len(labels) > 1))
    judged.sort(key=lambda one: (not one.leak, not one.conflict, one.group.kind == "near", one.group.rows))
    return Findings(
        sets=sets,
        views=views,
        duplicates=judged,
        flat=found.flat,
        classes=histogram(sets),
        sizes=size_statistics(views.sizes),
        channels=channel_statistics(sets),
    )
