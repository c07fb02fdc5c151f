"""Reading of corpus files: bytes are counted and hashed while they are read and decompressed; damage is reported."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from megadiff.data.corpus_lines import CHUNK_BYTES
from megadiff.errors import DataError

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
"""Suffixes of files with one JSON object per line."""

_ZSTD_SLICE_BYTES = 2**10  # a 4-byte compressed block can expand to 128 KiB, so a slice expands to 32 MiB at most


class HashedFile(io.RawIOBase):
    """A file that counts and hashes the bytes read from it, so that hashing costs no second pass.

    Args:
        file: the open file.
        on_read: called with the number of bytes of each read.
    """

    def __init__(self, file: io.FileIO, on_read: Callable[[int], None]) -> None:
        self._file = file
        self._on_read = on_read
        self.sha256 = hashlib.sha256()
        self.bytes_read = 0

    def readable(self) -> bool:
        """Return whether the file can be read: always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the file goes and return the number of bytes."""
        count = self._file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:count])
        self.bytes_read += count
        self._on_read(count)
        return count


def kind_of(path: Path) -> str:
    """Return the suffix that indicates the kind of a corpus file, compressed or not."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz").removesuffix(".zst")).suffix


def check_input(path: Path) -> None:
    """Refuse paths that cannot be read as a corpus file.

    Raises:
        DataError: it is a folder, does not exist, has a name of an unknown kind, or cannot be read.
    """
    if path.is_dir():
        raise DataError(f"{path}: wanted a file, found a folder; name its files, for example {path}/*.jsonl")
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path after --input")
    kinds = (*JSON_SUFFIXES, ".txt", ".parquet")
    if kind_of(path) not in kinds:
        wanted = ", ".join(kinds)
        raise DataError(f"{path}: wanted a name that ends in one of {wanted} (also with .gz or .zst); rename the file")
    if not path.is_file():  # a pipe: opening and closing it as a test would end its writer
        return
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def unpacked(path: Path, raw: io.BufferedReader) -> Iterator[bytes]:
    """Yield the content of a corpus file, decompressed according to its name, in pieces of any size.

    Args:
        path: the file, for its name.
        raw: its bytes as stored on disk.

    Raises:
        DataError: a compressed stream is truncated or damaged, or the disk fails.
    """
    return _reporting_damage(path, _decompressed(path, raw))


def _decompressed(path: Path, raw: io.BufferedReader) -> Iterator[bytes]:
    suffix = path.suffix.lower()
    if suffix in (".gz", ".zst") and not raw.peek(1):
        raise EOFError("the file is empty")
    if suffix == ".zst":
        yield from _zstd_chunks(raw)
        return
    stream = gzip.GzipFile(fileobj=raw, mode="rb") if suffix == ".gz" else raw
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def _zstd_chunks(raw: io.BufferedReader) -> Iterator[bytes]:
    """Decompress frame by frame; the library's own stream reader accepts a truncated frame as complete."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    inside = False
    while data := raw.read(_ZSTD_SLICE_BYTES):
        while data:
            out = frame.decompress(data)
            if out:
                yield out
            inside = not frame.eof
            data = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
    if inside:
        raise EOFError("the last frame has no end")


def _reporting_damage(path: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from chunks
    except EOFError as error:
        raise DataError(f"{path}: the compressed file is cut short ({error}); fetch or make it again") from error
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        kind = path.suffix.lower()
        raise DataError(f"{path}: not a whole {kind} file ({error}); fetch or make it again") from error
    except OSError as error:
        raise DataError(f"{path}: reading failed ({error.strerror or error}); check the disk") from error
