"""HTML from words: everything that comes out of a file goes through `escaped`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_KEPT = "\n\t"


def escaped(text: str) -> str:
    """Text that can be no markup, inside an element or a quoted attribute.

    What does not print (control characters, text directions, halves of surrogate pairs) becomes U+FFFD, so that a
    name cannot reorder the page around it and the page can always be written as UTF-8.
    """
    shown = "".join(c if c.isprintable() or c in _KEPT else "\ufffd" for c in text)
    return html.escape(shown, quote=True)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str) -> str:
    """A table that scrolls sideways where it must.

    Args:
        heads: plain text.
        rows: cells as markup, already escaped; the first one heads its row.
        caption: plain text, for those who cannot see it as well.
    """
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return (
        f'<div class="wide"><table><caption>{escaped(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def paragraph(text: str) -> str:
    """A remark."""
    return f'<p class="remark">{escaped(text)}</p>'


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page with an anchor; nothing if it has nothing inside."""
    inside = "".join(parts)
    return f'<section id="{name}"><h2>{escaped(title)}</h2>{inside}</section>' if inside else ""
