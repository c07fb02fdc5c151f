"""Durable writes, files that survive a full disk, and safe reading of small files that others may have written.

A small file is replaced in one step (`write_atomically`); a file that grows by whole records keeps in memory the
records that a full disk refuses, and writes them once there is space (`AppendedFile`).

A FIFO in place of a file would block forever, a sparse file of 8 GB would fill the memory, and JSON nested a hundred
thousand levels deep would exhaust the stack of any code that walks it. Every reader of such files uses this module.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from pydantic import ValidationError


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)


def is_storage_failure(error: OSError) -> bool:
    """Return whether a disk is full or failing, which may pass, as opposed to a path that can never be written."""
    return error.errno in _STORAGE_ERRORS


def write_atomically(path: Path, content: str | bytes | Iterable[bytes], *, is_durable: bool = True) -> None:
    """Replace a file in one step: a reader sees either the old or the new one, even after a power failure.

    The temporary file beside it has an unpredictable name and is created exclusively, so an existing symbolic link is
    never followed. If `path` itself is a link, the link is replaced and its target is left alone.

    Args:
        path: the file.
        content: all of it, or its parts in order.
        is_durable: wait until content and name are on the disk; without it a power failure may lose the new file.

    Raises:
        OSError: the disk refuses the write; the old file stays and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with open(handle, "wb") as file:
            content = content.encode() if isinstance(content, str) else content
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            if is_durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if is_durable:
        sync(path.parent)


def clear_temporaries(folder: Path) -> None:
    """Delete the temporary files of killed `write_atomically` calls; call only while nobody writes to the folder."""
    for path in _listed(folder):
        if _TEMPORARY.fullmatch(path.name) and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.unlink()


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk.

    Raises:
        OSError: the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AppendedFile:
    """A file that grows by whole records. Records that the disk refuses wait in memory and are written later, in order.

    Writes are unbuffered, since a buffer could write a refused record twice. Only `sync` raises.
    """

    def __init__(self, path: Path, *, most_waiting: int | None = None) -> None:
        """Prepare the file; it is opened when the first record is appended.

        Args:
            most_waiting: bytes that may wait; records beyond that are dropped, and none is kept for `sync` to repeat.
                Unset: no limit, and every record since the last `sync` is kept.
        """
        self.path = path
        self._most_waiting = most_waiting
        self._handle: int | None = None
        self._waiting = self._unsynced = b""
        self._synced_size = 0
        self._is_suspect = False

    @property
    def is_waiting(self) -> bool:
        """Whether there are records that the disk has not accepted yet."""
        return bool(self._waiting)

    def append(self, record: bytes) -> OSError | None:
        """Write a record after those that are waiting; return the error if the disk refuses."""
        if self._most_waiting is None or len(self._waiting) + len(record) <= self._most_waiting:
            self._waiting += record
        return self.flush()

    def flush(self) -> OSError | None:
        """Pass the waiting records to the operating system; return the error if the disk refuses."""
        try:
            while self._waiting:
                handle = self._open()
                written = os.write(handle, self._waiting)
                if written == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._unsynced += self._waiting[:written] if self._most_waiting is None else b""
                self._waiting = self._waiting[written:]
        except OSError as error:
            return error
        return None

    def sync(self) -> None:
        """Wait until every record is on the disk.

        A disk that reports a failed write may have dropped everything since the last successful sync, so these records
        are written again by the next call.

        Raises:
            OSError: the disk refuses; no record is lost.
        """
        if (error := self.flush()) is not None:
            raise error
        if self._handle is None:
            return
        try:
            os.fsync(self._handle)
        except OSError:
            self._waiting, self._unsynced, self._is_suspect = self._unsynced + self._waiting, b"", True
            raise
        self._synced_size += len(self._unsynced)
        self._unsynced = b""

    def close(self) -> bool:
        """Try once more to write the waiting records, then close; return whether everything was written."""
        self.flush()
        if self._handle is not None:
            with contextlib.suppress(OSError):
                os.close(self._handle)
            self._handle = None
        return not self._waiting

    def _open(self) -> int:
        if self._handle is None:
            self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._synced_size = os.fstat(self._handle).st_size
        if self._is_suspect:
            os.ftruncate(self._handle, self._synced_size)
            self._is_suspect = False
        return self._handle


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


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


_NESTING = (list, dict)  # a tuple: for each of the millions of values of a file, a union takes three times as long


def is_deeper(value: Any, depth: int) -> bool:
    """Return whether lists and objects nest deeper than `depth`, without recursion."""
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            if isinstance(outer, _NESTING)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, _NESTING)
        ]
        if not level:
            return False
    return True
