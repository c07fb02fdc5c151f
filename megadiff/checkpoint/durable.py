"""Files whose SHA-256 is taken as they are written, or as they are read back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megadiff.checkpoint.manifest import FileEntry

_BLOCK = 2**20


class HashingFile:
    """A new file whose SHA-256 is taken as it is written, so that no byte is read back to be hashed.

    Has what torch's writers ask of a stream: `write`, `tell`, `flush`. Refuses a path that exists.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self._bytes = 0
        self.failure: OSError | None = None
        """Why a write failed; torch's zip writer turns it into "unexpected pos 30 vs 0"."""

    def write(self, data: bytes | memoryview) -> int:
        """Append; returns the number of bytes."""
        try:
            self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self._digest.update(data)
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        self._bytes += size
        return size

    def tell(self) -> int:
        """Bytes so far."""
        return self._bytes

    def flush(self) -> None:
        """Hand buffered bytes to the operating system."""
        self._file.flush()

    def sync(self) -> None:
        """Wait until the disk has them."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close without waiting for the disk."""
        self._file.close()

    def entry(self) -> FileEntry:
        """Size and hash of what was written."""
        return FileEntry(bytes=self._bytes, sha256=self._digest.hexdigest())


@contextmanager
def hashed_file(path: Path) -> Iterator[HashingFile]:
    """Write a new file; on leaving the block without an error it is on the disk.

    Raises:
        OSError: the first that a write met, whatever was made of it on its way here.
    """
    file = HashingFile(path)
    try:
        yield file
        file.sync()
    except RuntimeError:
        if file.failure is not None:
            raise file.failure from None
        raise
    finally:
        file.close()


def entry_of(path: Path) -> FileEntry:
    """Size and SHA-256 of a file as it is read back."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return FileEntry(bytes=size, sha256=digest.hexdigest())
