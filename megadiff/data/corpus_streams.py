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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import zstandard

from megadiff.data.remote_files import CorpusPath, RemotePath, corpus_path
from megadiff.errors import DataError
from megadiff.untrusted_files import UnreadableFileError, parse_json, read_bytes, why

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

    def __init__(self, file: io.RawIOBase, on_read: Callable[[int], None], *, limit: int | None = None) -> None:
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


def kind_of(path: CorpusPath) -> str:
    """Return the suffix that indicates the kind of a corpus file, compressed or not."""
    if path == STDIN:
        return JSON_SUFFIXES[0]
    name = path.name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return PurePath(name).suffix


def open_input(path: CorpusPath) -> io.RawIOBase:
    """Return a corpus file, or standard input, open for reading bytes.

    Raises:
        DataError: it has gone or may not be read.
    """
    if isinstance(path, RemotePath):
        return path.open()
    if path == STDIN:
        return io.FileIO(sys.stdin.fileno(), closefd=False)
    try:
        return io.FileIO(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore the file or its permissions") from error


def open_buffered(path: CorpusPath) -> io.BufferedReader:
    """Return a corpus file open for reading at any place."""
    return io.BufferedReader(open_input(path), CHUNK_BYTES)


def size_of(path: CorpusPath) -> int:
    """Return the number of bytes of a corpus file as stored; 0 for standard input and where a store does not say."""
    if isinstance(path, RemotePath):
        return path.facts().bytes or 0
    return 0 if path == STDIN else path.stat().st_size


def check_input(path: CorpusPath) -> None:
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
    if isinstance(path, RemotePath) or not path.is_file():  # opening and closing a pipe as a test would end its writer
        return
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def line_start(path: CorpusPath, offset: int) -> int:
    """Return the byte at which the first line that starts at or after `offset` starts; the file's size without one."""
    with open_buffered(path) as file:
        if offset:
            file.seek(offset - 1)
            while (chunk := file.readline(CHUNK_BYTES)) and not chunk.endswith(b"\n"):
                pass
        return file.tell()


def count_lines(path: CorpusPath, end: int) -> int:
    """Return the number of line ends among the first `end` bytes of a file."""
    count = 0
    with open_buffered(path) as file:
        while end and (chunk := file.read(min(end, CHUNK_BYTES))):
            count += chunk.count(b"\n")
            end -= len(chunk)
    return count


def unpacked(path: CorpusPath, raw: io.BufferedReader) -> Iterator[bytes]:
    """Yield the content of a corpus file, decompressed according to its name, in pieces of any size.

    Args:
        path: the file, for its name.
        raw: its bytes as stored on disk.

    Raises:
        DataError: a compressed stream is truncated or damaged, or the disk fails.
    """
    return _reporting_damage(path, _decompressed(path, raw))


def _decompressed(path: CorpusPath, raw: io.BufferedReader) -> Iterator[bytes]:
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


def _reporting_damage(path: CorpusPath, chunks: Iterator[bytes]) -> Iterator[bytes]:
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
        raise DataError(f"{path}: reading failed ({error.strerror or error}); check the disk or the store") from error


def expanded(inputs: Iterable[str | CorpusPath]) -> list[CorpusPath]:
    """Return the corpus files that paths, URLs, patterns and folders name.

    A folder means all files below it whose names are those of corpus files, and a pattern that the shell has not
    expanded means the files that it matches, both sorted by path; hidden files are left out. A folder that
    `datasets.save_to_disk` wrote means the files that its `state.json` lists. `-` is standard input.

    Raises:
        DataError: a folder or a pattern has no such file, a folder holds several splits, or a store cannot be reached.
    """
    found: list[CorpusPath] = []
    for given in map(corpus_path, inputs):
        if given.is_dir():
            found += _files_of(given)
        elif any(mark in str(given) for mark in "*?[") and not given.exists():
            files = _matches(given)
            if not files:
                raise DataError(f"{given}: no file matches; check the path after --input")
            found += files
        else:
            found.append(given)
    return found


def _matches(pattern: CorpusPath) -> Sequence[CorpusPath]:
    if isinstance(pattern, RemotePath):
        return pattern.matches()
    return sorted(Path(path) for path in glob.glob(str(pattern), recursive=True))


def _files_of(folder: CorpusPath) -> Sequence[CorpusPath]:
    """Return the corpus files of a folder."""
    if (folder / "dataset_dict.json").is_file():
        states = [path for path in _below(folder) if path.name == _STATE]
        splits = ", ".join(str(path).removesuffix(f"/{_STATE}") for path in states) or "its folders"
        raise DataError(f"{folder}: wanted one split of a dataset, found a folder of several; name one of {splits}")
    if (folder / _STATE).is_file():
        return _saved_files(folder)
    files = [path for path in _below(folder) if _is_corpus_file(path, folder)]
    if not files:
        wanted = ", ".join(_KINDS)
        raise DataError(f"{folder}: wanted a file, found a folder without files that end in one of {wanted}")
    return files


def _below(folder: CorpusPath) -> Sequence[CorpusPath]:
    return folder.below() if isinstance(folder, RemotePath) else sorted(folder.rglob("*"))


def _saved_files(folder: CorpusPath) -> list[CorpusPath]:
    """Return the files of a saved dataset; others beside them may be caches of its users."""
    path = folder / _STATE
    try:
        if isinstance(path, RemotePath):
            with open_buffered(path) as file:
                content = file.read(_MAX_STATE_BYTES)
        else:
            content = read_bytes(path, max_bytes=_MAX_STATE_BYTES)
        names = [file["filename"] for file in parse_json(content)["_data_files"]]
        if not all(isinstance(name, str) and PurePath(name).name == name for name in names):
            raise TypeError
    except (OSError, UnreadableFileError) as error:
        raise DataError(f"{path} {why(error)}; save the dataset again or name its files") from error
    except (KeyError, TypeError):
        raise DataError(f"{path}: wanted the names of a dataset's files; save it again or name its files") from None
    return [folder / name for name in names]


def _is_corpus_file(path: CorpusPath, folder: CorpusPath) -> bool:
    if isinstance(path, RemotePath) and isinstance(folder, RemotePath):
        parts = path.relative_to(folder).parts
    else:
        parts = Path(str(path)).relative_to(str(folder)).parts
    is_hidden = any(part.startswith((".", "_")) for part in parts)
    of_a_dataset = path.name in ("dataset_info.json", _STATE)
    return not is_hidden and not of_a_dataset and kind_of(path) in _KINDS and path.is_file()
