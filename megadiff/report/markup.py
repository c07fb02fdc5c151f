"""HTML from text, everything that comes from a file going through `escaped`, and the file of a page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from megadiff.errors import DataError
from megadiff.files import write_atomically

_KEPT = "\n\t"


def escaped(text: str) -> str:
    """Return text that cannot act as markup, for use inside an element or a quoted attribute.

    Characters that do not print (control characters, text directions, halves of surrogate pairs) become U+FFFD, so that
    a name cannot reorder the page around it, and the page can always be encoded as UTF-8.
    """
    shown = "".join(c if c.isprintable() or c in _KEPT else "\ufffd" for c in text)
    return html.escape(shown, quote=True)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str) -> str:
    """Return a table that scrolls sideways if it is too wide.

    Args:
        heads: plain text.
        rows: cells as markup, already escaped; the first cell is the header of its row.
        caption: plain text, also read out by screen readers.
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
    """Return a remark as a paragraph."""
    return f'<p class="remark">{escaped(text)}</p>'


def section(name: str, title: str, *parts: str) -> str:
    """Return a section of the page with an anchor; an empty string if it has no content."""
    inside = "".join(parts)
    return f'<section id="{name}"><h2>{escaped(title)}</h2>{inside}</section>' if inside else ""


def check_page_file(option: str, path: Path) -> None:
    """Refuse a file that cannot be, or should not become, a page.

    Args:
        option: the option that names it, for the message.
        path: the file.

    Raises:
        DataError: its name is not that of a page, its folder does not exist, or it is a folder.
    """
    if path.suffix not in (".html", ".htm"):
        raise DataError(f"{option} {path}: a name that ends in .html is wanted, so that no file of a run is replaced")
    if not path.parent.is_dir():
        raise DataError(f"{option} {path}: there is no folder {path.parent}; make it, or name another one")
    if path.is_dir():
        raise DataError(f"{option} {path}: this is a folder; name a file")


def write_page(option: str, path: Path, page: str) -> None:
    """Write a page.

    Raises:
        DataError: it cannot be written.
    """
    try:
        write_atomically(path, page)
    except OSError as error:
        raise DataError(f"{option} {path} cannot be written ({error.strerror or error}); name another one") from None
