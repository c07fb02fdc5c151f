"""Safe reading of small files that others may have written: without blocking, within a size limit, as shallow JSON.

A FIFO in place of a file would block forever, a sparse file of 8 GB would fill the memory, and JSON nested a hundred
thousand levels deep would exhaust the stack of any code that walks it. Every reader of such files uses this module.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_DEPTH = 64
"""Maximal nesting depth of lists and objects in JSON."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnreadableFileError(ValueError):
    """A file of the wrong kind; the message states what it is, such as `is a FIFO, not a plain file`."""


def why(error: OSError | UnreadableFileError) -> str:
    """Return what is wrong with a file, as the rest of a sentence that begins with its path."""
    return f"cannot be read ({error.strerror or error})" if isinstance(error, OSError) else str(error)


def first_fault(error: ValidationError, *, whole: str = "the file") -> tuple[str, str]:
    """Return the dotted key of the first fault that a validation found, `whole` for the object itself, and the rule."""
    first = error.errors(include_url=False)[0]
    return ".".join(map(str, first["loc"])) or whole, first["msg"]


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file for reading bytes; refuse anything else without waiting for its other end.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UnreadableFileError: it is a folder, FIFO, socket or device, or a path that no file can have.
        OSError: the system refuses to open it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, "No such file or directory", str(path)) from None
    except OSError:
        if (kind := _kind(path)) in _KINDS:  # opening a socket fails with an uninformative error number
            raise UnreadableFileError(f"is {_KINDS[kind]}, not a plain file") from None
        raise
    except ValueError:
        raise UnreadableFileError("is a path that no file can have") from None
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise UnreadableFileError(f"is {_KINDS.get(kind, 'something else')}, not a plain file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """Return the content of a plain file of at most `max_bytes` bytes.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UnreadableFileError: it is not a plain file, or is larger than that.
        OSError: it cannot be read.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1) if size <= max_bytes else b""  # read allocates as many bytes as are requested
        if len(data) > size:  # the file has grown, or does not report its size
            data += file.read(max_bytes + 1 - len(data))
        if max(size, len(data)) > max_bytes:
            raise UnreadableFileError(f"has {max(size, len(data)):,} bytes where at most {max_bytes:,} are wanted")
    return data


def read_text(path: Path, *, max_bytes: int) -> str:
    """Return the text of a plain UTF-8 file, with or without a byte order mark.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UnreadableFileError: it is not a plain file, too large, or not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return read_bytes(path, max_bytes=max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"is not UTF-8 text (byte {error.start})") from None


def read_json(path: Path, *, max_bytes: int, max_depth: int = MAX_DEPTH) -> Any:
    """Return the value of a plain JSON file; NaN and Infinity, which Python's own writer emits, are numbers.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UnreadableFileError: it is not a plain file, too large, not UTF-8, not JSON, or nested too deep.
        OSError: it cannot be read.
    """
    return parse_json(read_text(path, max_bytes=max_bytes), max_depth=max_depth)


def read_json_object(path: Path, *, max_bytes: int, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Return the object in a plain JSON file (`read_json`).

    Raises:
        FileNotFoundError: there is nothing at the path.
        UnreadableFileError: as for `read_json`, or the value is not an object.
        OSError: it cannot be read.
    """
    found = read_json(path, max_bytes=max_bytes, max_depth=max_depth)
    if not isinstance(found, dict):
        raise UnreadableFileError(f"is not a JSON object but {type_name(found)}")
    return found


def parse_json(text: str | bytes, *, max_depth: int = MAX_DEPTH) -> Any:
    """Return the value of a JSON text.

    Raises:
        UnreadableFileError: it is not JSON, or nested deeper than `max_depth`.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise UnreadableFileError(f"is nested deeper than {max_depth} levels") from None
    except json.JSONDecodeError as error:
        raise UnreadableFileError(f"is not JSON ({error})") from None
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"is not UTF-8 text (byte {error.start})") from None
    except ValueError:  # Python refuses integers of more than 4,300 digits
        raise UnreadableFileError("holds an integer of thousands of digits") from None
    if is_deeper(found, max_depth):
        raise UnreadableFileError(f"is nested deeper than {max_depth} levels")
    return found


def lines(path: Path, *, max_bytes: int) -> Iterator[bytes | None]:
    """Yield the lines of a plain file of any length, line ends included; None for a line longer than `max_bytes`.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UnreadableFileError: it is not a plain file.
        OSError: it cannot be read.
    """
    with open_plain(path) as file:
        while line := file.readline(max_bytes):
            if line.endswith(b"\n") or len(line) < max_bytes:
                yield line
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(max_bytes)
            yield None


def type_name(value: Any) -> str:
    """Return the JSON name of a value's type with its article."""
    names: dict[type, str] = {
        dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"
    }  # fmt: skip
    return names.get(type(value), "null")


def _kind(path: Path) -> int | None:
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except OSError:
        return None


def is_deeper(value: Any, depth: int) -> bool:
    """Return whether lists and objects nest deeper than `depth`, without recursion."""
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
        if not level:
            return False
    return True
