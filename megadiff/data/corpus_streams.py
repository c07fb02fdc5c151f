"""Corpus files, local or at a URL, as streams of bytes: hashed while they are read, decompressed in bounded memory."""

from __future__ import annotations

import bz2
import errno
import glob
import gzip
import hashlib
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePath, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import zstandard

from megadiff.errors import DataError
from megadiff.files import UnreadableFileError, parse_json, read_bytes, why

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z][A-Za-z0-9+.-]+)*://")
_INSTALL = "pip install 'megadiff[fsspec]'"
_REMEDY = "check the address, the network and the store's credentials"
_VERSIONS = ("ETag", "etag", "blob_id", "md5", "LastModified", "last_modified", "updated", "mtime", "created")
"""Keys under which stores give what changes with a file's content or at each write, the surest first."""


@dataclass(frozen=True)
class RemoteFacts:
    """A store's description of a file or folder."""

    is_folder: bool

    bytes: int | None
    """Size; None where the store does not give it."""

    version: str | None
    """Value that differs between versions of the file, with its name; None where the store gives none."""


class RemotePath:
    """The URL of a file or folder, with the part of `pathlib.Path` by which a corpus is read.

    What the store says of the file is looked up once and kept.

    Args:
        url: the URL.
        facts: the store's description, if it is known already.
    """

    def __init__(self, url: str, facts: RemoteFacts | None = None) -> None:
        self._url = url
        self._known = facts

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other._url == self._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self._url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        is_web = self._url.partition("://")[0].lower() in ("http", "https")
        return PurePosixPath(urlsplit(self._url).path if is_web else self._url).name

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot on."""
        return PurePosixPath(self.name).suffix

    def exists(self) -> bool:
        """Return whether there is a file or folder."""
        return self._facts() is not None

    def is_file(self) -> bool:
        """Return whether there is a file."""
        facts = self._facts()
        return facts is not None and not facts.is_folder

    def is_dir(self) -> bool:
        """Return whether there is a folder."""
        facts = self._facts()
        return facts is not None and facts.is_folder

    def facts(self, *, is_fresh: bool = False) -> RemoteFacts:
        """Return what the store says of a file or folder.

        Args:
            is_fresh: look it up again, past everything that is kept.

        Raises:
            DataError: it does not exist, or the store cannot be reached.
        """
        if is_fresh:
            self._known = None
            self._store()[0].invalidate_cache()
        facts = self._facts()
        if facts is None:
            raise DataError(f"{self}: no such file; check the path after --input")
        return facts

    def open(self) -> io.RawIOBase:
        """Return the file open for reading bytes.

        Raises:
            DataError: it cannot be opened.
        """
        store, path = self._store()
        try:
            return _RemoteFile(store.open(path, "rb"))
        except Exception as error:
            raise self._unreadable(error) from error

    def matches(self) -> list[RemotePath]:
        """Return the files and folders that the URL, as a pattern, matches, sorted."""
        return self._listed("glob")

    def below(self) -> list[RemotePath]:
        """Return all files in the folder and its folders, sorted."""
        return self._listed("find")

    def relative_to(self, folder: RemotePath) -> PurePosixPath:
        """Return the path from a folder above to this file."""
        return PurePosixPath(self._store()[1]).relative_to(folder._store()[1])

    def _listed(self, way: str) -> list[RemotePath]:
        store, path = self._store()
        try:
            found: dict[str, dict[str, Any]] = getattr(store, way)(path, detail=True)
        except Exception as error:
            raise self._unreadable(error) from error
        protocol = self._url.partition("://")[0]
        urls = {name if "://" in name else f"{protocol}://{name}": facts for name, facts in found.items()}
        return [RemotePath(url, _facts_of(urls[url])) for url in sorted(urls)]

    def _facts(self) -> RemoteFacts | None:
        if self._known is None:
            store, path = self._store()
            try:
                self._known = _facts_of(store.info(path))
            except FileNotFoundError:
                return None
            except Exception as error:  # each store has exceptions of its own
                raise self._unreadable(error) from error
        return self._known

    def _store(self) -> tuple[Any, str]:
        """Return fsspec's file system for the URL, and the path in it."""
        protocol = self._url.partition("://")[0]
        try:
            from fsspec.core import url_to_fs  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise DataError(f"{self}: reading {protocol}:// needs fsspec; {_INSTALL}") from None
        try:
            return url_to_fs(self._url)
        except ImportError as error:
            raise DataError(f"{self}: reading {protocol}:// needs one more package ({error}); {_INSTALL}") from None
        except ValueError as error:
            remedy = "write for example s3://bucket/corpus/*.jsonl"
            raise DataError(f"{self}: fsspec cannot read it ({_sentence(error)}); {remedy}") from error
        except Exception as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"{self}: cannot be read ({_sentence(error)}); {_REMEDY}")


CorpusPath = Path | RemotePath
"""Path or URL of a corpus file."""


def corpus_path(given: str | CorpusPath) -> CorpusPath:
    """Return the path, or the URL, that a word of the command line names."""
    if isinstance(given, str):
        return RemotePath(given) if _URL.match(given) else Path(given)
    return given


class _RemoteFile(io.RawIOBase):
    """A file that fsspec has opened, whose failures are all `OSError`."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _as_os_errors():
            return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = 0) -> int:
        with _as_os_errors():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextmanager
def _as_os_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise OSError(errno.EIO, _sentence(error)) from error


def _sentence(error: Exception) -> str:
    """Return the first line of an error, or its name."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]


def _facts_of(info: dict[str, Any]) -> RemoteFacts:
    version = next((f"{key} {_text(info[key])}" for key in _VERSIONS if info.get(key) is not None), None)
    size = info.get("size")
    return RemoteFacts(info.get("type") == "directory", None if size is None else int(size), version)


def _text(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value).strip('"')


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
