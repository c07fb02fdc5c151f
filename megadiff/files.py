"""Durable writes, and files that survive a full disk. Uses the standard library alone.

A small file is replaced in one step (`write_atomically`); a file that grows by whole records keeps in memory the
records that a full disk refuses, and writes them once there is space (`AppendedFile`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

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
