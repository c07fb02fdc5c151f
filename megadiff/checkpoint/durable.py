"""Files whose SHA-256 is computed while they are written or read back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megadiff.checkpoint.manifest import FileEntry

_BLOCK = 2**20


class HashingFile:
    """A new file whose SHA-256 is computed while it is written, so that it need not be read back for hashing.

    It has the methods that torch's writers call on a stream: `write`, `tell`, `flush`. A path that exists is refused.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self._bytes = 0
        self.failure: OSError | None = None
        """Cause of a failed write, which torch's zip writer would turn into "unexpected pos 30 vs 0"."""

    def write(self, data: bytes | memoryview) -> int:
        """Append the data and return the number of bytes."""
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
        """Return the number of bytes written so far."""
        return self._bytes

    def flush(self) -> None:
        """Pass buffered bytes to the operating system."""
        self._file.flush()

    def sync(self) -> None:
        """Wait until all bytes are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close without waiting for the disk."""
        self._file.close()

    def entry(self) -> FileEntry:
        """Return the size and hash of what was written."""
        return FileEntry(bytes=self._bytes, sha256=self._digest.hexdigest())


@contextmanager
def hashed_file(path: Path) -> Iterator[HashingFile]:
    """Write a new file, which is on the disk once the block is left without an error.

    Raises:
        OSError: the first error of a write, even if torch has replaced it by another exception.
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
    """Read a file and return its size and SHA-256."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return FileEntry(bytes=size, sha256=digest.hexdigest())
