"""The file of a page that a command writes: its name is checked before the work, and it is replaced in one step."""

from __future__ import annotations

from pathlib import Path

from megadiff.errors import DataError
from megadiff.files import write_atomically


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
