"""Corpus files as streams of bytes: their kinds, hashed while they are read, decompressed in bounded memory."""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from megadiff.errors import DataError
from megadiff.untrusted_files import UnreadableFileError, read_json_object, why

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
"""Suffixes of files with one JSON object per line."""

CSV_SUFFIXES = (".csv", ".tsv")
"""Suffixes of files with a line of column names and then one document per record."""

TABLE_SUFFIXES = (".parquet", ".arrow")
"""Suffixes of files with one document per row, which pyarrow reads."""

COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
"""Second suffixes of files that are compressed."""

STDIN = Path("-")
"""Path that means standard input, which holds JSON lines."""

CHUNK_BYTES = 2**20
"""Size of the pieces in which bytes are passed on."""

_STATE = "state.json"
_MAX_STATE_BYTES = 2**26
_KINDS = (*JSON_SUFFIXES, ".txt", *CSV_SUFFIXES, *TABLE_SUFFIXES)
_ZSTD_SLICE_BYTES = 2**10  # a 4-byte compressed block can expand to 128 KiB, so a slice expands to 32 MiB at most


class HashedFile(io.RawIOBase):
    """A file that counts and hashes the bytes read from it, so that hashing costs no second pass.

    Args:
        file: the open file.
        on_read: called with the number of bytes of each read.
        limit: number of bytes, from the file's position on, after which it ends; by default those of the whole file.
    """

    def __init__(self, file: io.FileIO, on_read: Callable[[int], None], *, limit: int | None = None) -> None:
        self._file = file
        self._on_read = on_read
        self._limit = limit
        self.sha256 = hashlib.sha256()
        self.bytes_read = 0

    def readable(self) -> bool:
        """Return whether the file can be read: always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the file goes and return the number of bytes."""
        if self._limit is not None:
            buffer = memoryview(buffer)[: self._limit - self.bytes_read]
        count = self._file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:count])
        self.bytes_read += count
        self._on_read(count)
        return count


def kind_of(path: Path) -> str:
    """Return the suffix that indicates the kind of a corpus file, compressed or not."""
    if path == STDIN:
        return JSON_SUFFIXES[0]
    name = path.name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def open_input(path: Path) -> io.FileIO:
    """Return a corpus file, or standard input, open for reading bytes."""
    return io.FileIO(sys.stdin.fileno(), closefd=False) if path == STDIN else io.FileIO(path)


def check_input(path: Path) -> None:
    """Refuse paths that cannot be read as a corpus file.

    Raises:
        DataError: it is a folder, does not exist, has a name of an unknown kind or not in UTF-8, or cannot be read.
    """
    if path == STDIN:
        return
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:  # manifests, which are JSON, hold the name
        raise DataError(f"{str(path)!r}: wanted a path in UTF-8, found other bytes in it; rename the file") from None
    if path.is_dir():
        raise DataError(f"{path}: wanted a file, found a folder; name its files, for example {path}/*.jsonl")
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path after --input")
    if kind_of(path) not in _KINDS:
        wanted, packed = ", ".join(_KINDS), ", ".join(COMPRESSED_SUFFIXES)
        raise DataError(f"{path}: wanted a name that ends in one of {wanted} (also with {packed}); rename the file")
    if not path.is_file():  # a pipe: opening and closing it as a test would end its writer
        return
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def line_start(path: Path, offset: int) -> int:
    """Return the byte at which the first line that starts at or after `offset` starts; the file's size without one."""
    with open(path, "rb") as file:
        if offset:
            file.seek(offset - 1)
            while (chunk := file.readline(CHUNK_BYTES)) and not chunk.endswith(b"\n"):
                pass
        return file.tell()


def count_lines(path: Path, end: int) -> int:
    """Return the number of line ends among the first `end` bytes of a file."""
    count = 0
    with open(path, "rb") as file:
        while end and (chunk := file.read(min(end, CHUNK_BYTES))):
            count += chunk.count(b"\n")
            end -= len(chunk)
    return count


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
    if suffix in COMPRESSED_SUFFIXES and not raw.peek(1):
        raise EOFError("the file is empty")
    if suffix == ".zst":
        yield from _zstd_chunks(raw)
        return
    packed = {".gz": gzip.GzipFile, ".bz2": bz2.open, ".xz": lzma.open}
    stream = packed[suffix](fileobj=raw) if suffix == ".gz" else packed[suffix](raw) if suffix in packed else raw
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
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, lzma.LZMAError) as error:
        kind = path.suffix.lower()
        raise DataError(f"{path}: not a whole {kind} file ({error}); fetch or make it again") from error
    except OSError as error:
        if error.errno is None:  # as bz2 reports damage
            raise DataError(f"{path}: not a whole .bz2 file ({error}); fetch or make it again") from error
        raise DataError(f"{path}: reading failed ({error.strerror or error}); check the disk") from error


def expanded(inputs: Iterable[str | Path]) -> list[Path]:
    """Return the corpus files that paths, patterns and folders name.

    A folder means all files below it whose names are those of corpus files, and a pattern that the shell has not
    expanded means the files that it matches, both sorted by path; hidden files are left out. A folder that
    `datasets.save_to_disk` wrote means the files that its `state.json` lists. `-` is standard input.

    Raises:
        DataError: a folder or a pattern has no such file, or a folder holds several splits.
    """
    found: list[Path] = []
    for given in map(Path, inputs):
        if (given / "dataset_dict.json").is_file():
            splits = ", ".join(str(path.parent) for path in sorted(given.glob(f"*/{_STATE}"))) or "its folders"
            raise DataError(f"{given}: wanted one split of a dataset, found a folder of several; name one of {splits}")
        if (given / _STATE).is_file():
            found += _saved_files(given)
        elif given.is_dir():
            files = [path for path in sorted(given.rglob("*")) if _is_corpus_file(path.relative_to(given), path)]
            if not files:
                wanted = ", ".join(_KINDS)
                raise DataError(f"{given}: wanted a file, found a folder without files that end in one of {wanted}")
            found += files
        elif not given.exists() and any(mark in str(given) for mark in "*?["):
            files = sorted(Path(path) for path in glob.glob(str(given), recursive=True))
            if not files:
                raise DataError(f"{given}: no file matches; check the path after --input")
            found += files
        else:
            found.append(given)
    return found


def _saved_files(folder: Path) -> list[Path]:
    """Return the files of a saved dataset; others beside them may be caches of its users."""
    path = folder / _STATE
    try:
        listed = read_json_object(path, max_bytes=_MAX_STATE_BYTES)["_data_files"]
        names = [file["filename"] for file in listed]
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise TypeError
    except (OSError, UnreadableFileError) as error:
        raise DataError(f"{path} {why(error)}; save the dataset again or name its files") from error
    except (KeyError, TypeError):
        raise DataError(f"{path}: wanted the names of a dataset's files; save it again or name its files") from None
    return [folder / name for name in names]


def _is_corpus_file(name: Path, path: Path) -> bool:
    is_hidden = any(part.startswith((".", "_")) for part in name.parts)
    of_a_dataset = path.name in ("dataset_info.json", _STATE)
    return not is_hidden and not of_a_dataset and kind_of(path) in _KINDS and path.is_file()
