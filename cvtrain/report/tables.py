"""Tables that a reader may sort."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it shows: plain text, or HTML where `markup` is set.
        value: What it is sorted by, and makes it a number; None: by its text.
        markup: Whether `text` is HTML.
        kind: Class in the style; empty: none.
        hint: Text under the pointer.
    """

    text: str
    value: float | None = None
    markup: bool = False
    kind: str = ""
    hint: str = ""


def sortable(heads: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str, kind: str = "") -> str:
    """Return a table whose columns sort by click or key; the first cell of a row is its head.

    Args:
        heads: Plain texts.
        rows: Cells, as many a row as heads.
        caption: What it is, for those who do not see it.
        kind: `tall` for one that scrolls by itself when it is long; empty: none.
    """
    numeric = [
        any(row[i].value is not None and not row[i].kind.startswith("bar") for row in rows) for i in range(len(heads))
    ]
    head = "".join(
        f'<th scope="col"{" class=n" * right}>{escape(text)}</th>' for text, right in zip(heads, numeric, strict=True)
    )
    body = "".join(f"<tr>{''.join(_cell(cell, i == 0) for i, cell in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class="wide {kind}" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="sortable">'
        f'<caption class="unseen">{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _cell(cell: Cell, first: bool) -> str:
    kind = cell.kind or ("n" if cell.value is not None else "")
    name = "th" if first else "td"
    attributes = ' scope="row"' * first + f' class="{kind}"' * bool(kind)
    if cell.value is not None:
        attributes += f' data-v="{cell.value if math.isfinite(cell.value) else ""}"'
    if cell.hint:
        attributes += f' title="{escape(cell.hint)}"'
    return f"<{name}{attributes}>{cell.text if cell.markup else escape(cell.text)}</{name}>"
