"""Parts of a page that is one file: HTML that needs no network, and shows every text as it is."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

from PIL import Image


def document(title: str, body: str, style: str, script: str = "") -> str:
    """Return a whole page.

    Args:
        title: Of the window, plain text.
        body: HTML: a `header`, perhaps a `nav`, and a `main`.
        style: CSS behind the common one.
        script: JavaScript that runs when the page is there; empty: none.
    """
    code = f"<script>\n{script}</script>\n" if script else ""
    css = asset("cvtrain.core", "page.css") + style
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>\n{css}</style>\n</head>\n<body>\n{body}\n{code}</body>\n</html>\n"
    )
    # File names that are no UTF-8 come with lone surrogates, which cannot be written.
    return text.encode("utf-8", "replace").decode()


def asset(package: str, name: str) -> str:
    """Return the text of a style or script that lies in a package."""
    return (resources.files(package) / name).read_text(encoding="utf-8")


def section(title: str, anchor: str, body: str) -> str:
    """Return a section with its heading; `title` is plain text, `body` HTML."""
    return f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n{body}\n</section>'


def tiles(pairs: Iterable[tuple[str, str]]) -> str:
    """Return names and large values side by side, both plain text."""
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="tiles">{shown}</dl>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "words") -> str:
    """Return a table of plain texts, the first cell of a row being its head; `kind` is a class: words or numbers."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(text)}</td>" for text in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(image: Image.Image, text: str) -> str:
    """Return an `img` with what it shows in words, plain text."""
    return (
        f'<img src="{data_uri(image)}" width="{image.width}" height="{image.height}" alt="{escape(text, quote=True)}">'
    )


def data_uri(image: Image.Image) -> str:
    """Return a picture as the address of itself: RGB as JPEG, others as PNG."""
    buffer = io.BytesIO()
    settings: dict[str, Any] = {"quality": 80} if image.mode == "RGB" else {}
    kind = "jpeg" if image.mode == "RGB" else "png"
    image.save(buffer, kind.upper(), **settings)
    return embedded(buffer.getvalue(), kind)


def embedded(data: bytes, kind: str) -> str:
    """Return the bytes of a picture file of `kind` (png, jpeg) as an address."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
