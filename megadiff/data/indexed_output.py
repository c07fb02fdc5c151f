"""The three files of one prefix while they are written: complete under their final names, or not there at all.

Everything is written under temporary names (`P.bin.tmp`, ...), flushed to disk, and renamed in the order .bin, .json,
.idx; readers look for the .idx. A killed run leaves temporary files, which the next run on the same prefix overwrites.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from types import TracebackType

from megadiff.data.indexed_format import bin_path, idx_path, manifest_path
from megadiff.data.indexed_manifest import IndexedManifest, manifest_bytes
from megadiff.errors import DataError
from megadiff.files import sync


class IndexedOutput:
    """The files of one prefix; a context manager that removes the temporary ones unless `publish` ran.

    Args:
        prefix: P; its folder is created if missing.
        overwrite: replace finished data of the same prefix, which are otherwise refused.

    Raises:
        DataError: data exist already, the folder cannot be written, or another process is writing this prefix.
    """

    def __init__(self, prefix: str | Path, *, overwrite: bool = False) -> None:
        self.prefix = str(prefix)
        self._finals = [bin_path(prefix), manifest_path(prefix), idx_path(prefix)]
        self._temporaries = [Path(f"{path}.tmp") for path in self._finals]
        self._refuse_existing(overwrite)
        self.bin = self._open_locked()

    def write(self, content: bytes) -> None:
        """Append to the `.bin`.

        Raises:
            DataError: the disk is full.
        """
        try:
            self.bin.write(content)
        except OSError as error:
            where = self._temporaries[0]
            raise DataError(f"{where}: writing failed ({error.strerror}); free disk space and run again") from error

    def write_index(self, parts: Iterable[bytes]) -> str:
        """Write the whole `.idx` and flush it to disk; return its SHA-256 (hex).

        Raises:
            OSError: the disk refuses.
        """
        return write_whole(self._temporaries[2], parts)

    def publish(self, manifest: IndexedManifest) -> None:
        """Write the manifest, then rename all three files to their final names; the index has been written before.

        Raises:
            OSError: the disk refuses.
        """
        self.bin.flush()
        os.fsync(self.bin.fileno())
        write_whole(self._temporaries[1], [manifest_bytes(manifest)])
        idx_path(self.prefix).unlink(missing_ok=True)
        for temporary, final in zip(self._temporaries, self._finals, strict=True):
            os.replace(temporary, final)
        sync(self._finals[0].parent)
        self.bin.close()

    def refused(self, error: OSError) -> DataError:
        """Return the error for a disk that refused to finish the files."""
        return DataError(f"{self.prefix}: writing failed ({error.strerror}); free disk space and run again")

    def abort(self) -> None:
        """Remove the temporary files; after `publish` there are none."""
        if self.bin.closed:
            return
        for temporary in self._temporaries:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        with suppress(OSError):  # closing flushes, which may fail on a full disk
            self.bin.close()

    def __enter__(self) -> IndexedOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _refuse_existing(self, overwrite: bool) -> None:
        there = [path for path in self._finals if path.exists()]
        if there and not overwrite and not self._half_renamed():
            raise DataError(f"{there[0]}: data are there already; choose another --output-prefix or give --overwrite")

    def _half_renamed(self) -> bool:
        """Return whether a killed run left .bin and .json without .idx; it also left its .idx.tmp."""
        return self._temporaries[2].exists() and not self._finals[2].exists()

    def _open_locked(self) -> BufferedWriter:
        path = self._temporaries[0]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Opened with "ab", not "wb": until it is locked, the file may belong to another process.
            file = open(path, "ab")  # noqa: SIM115 - closed by `publish` or `abort`
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); choose another --output-prefix") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise DataError(f"{path}: another process is writing it; wait for it or choose another prefix") from None
        except OSError:
            pass  # a file system without locks, such as some NFS: two runs must not share a prefix there
        file.truncate(0)
        stale = self._finals[:2] if self._half_renamed() else []
        for path in (*stale, *self._temporaries[1:]):
            path.unlink(missing_ok=True)
        return file


def write_whole(path: Path, parts: Iterable[bytes]) -> str:
    """Write a file and flush it to disk; return its SHA-256 (hex)."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
