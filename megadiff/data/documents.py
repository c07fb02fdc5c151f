"""Text documents out of corpus files, one after another, in bounded memory and never half a document.

Kinds, by the file's name: `.jsonl` (also `.json`, `.ndjson`: one JSON object a line), `.txt` (one file is one
document), each also as `.gz` or `.zst`, and `.parquet` (one document a row; needs pyarrow).

A UTF-8 byte-order mark at a file's start is dropped, Windows line ends between JSON lines are accepted, blank lines
are no lines, and a document whose text is empty is skipped and counted. Everything else that is wrong makes a bad
line: counted, listed, and refused beyond `max_bad_lines`. A damaged or cut compressed stream is always refused.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import zstandard

from megadiff.errors import DataError

MAX_DOCUMENT_BYTES = 2**28
"""A longer line, text file or row is a bad one by default: it is surely an accident, and it is held in memory."""

_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_CHUNK_BYTES = 2**20
_ZSTD_SLICE_BYTES = 2**10  # a compressed block of 4 bytes can grow to 128 KiB, so a slice to some 32 MiB at most
_MAX_LISTED = 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputFile:
    """What was read: the file's name without its folder, its size and its SHA-256 as it lies on disk."""

    name: str
    bytes: int
    sha256: str


@dataclass
class CorpusReport:
    """What a pass over a corpus has met so far."""

    documents: int = 0
    """Documents handed out."""

    empty_documents: int = 0
    """Documents skipped because their text is empty."""

    bad_lines: int = 0
    """Lines skipped because they hold no text that can be used."""

    bad_examples: list[str] = field(default_factory=list)
    """`file:line: reason` of the first of them, at most 20."""

    bytes_read: int = 0
    """Bytes read from disk (compressed where the file is)."""

    files: list[InputFile] = field(default_factory=list)
    """Files read to their end."""


class Corpus:
    """Documents of several files in the order given.

    Args:
        paths: files; see the module's text for the kinds.
        json_key: the key (jsonl) or column (parquet) that holds the text.
        max_bad_lines: bad lines to skip over all files before the pass is refused; 0 refuses the first.
        max_document_bytes: of a line, text file or row, uncompressed; a longer one is a bad line, and no more of it
            is held than this.

    Raises:
        DataError: no files, a file that is missing, unreadable, a folder, or of an unknown kind.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        json_key: str = "text",
        max_bad_lines: int = 0,
        max_document_bytes: int = MAX_DOCUMENT_BYTES,
    ) -> None:
        if not paths:
            raise DataError("no input files were given; name at least one .jsonl, .txt or .parquet file")
        if max_bad_lines < 0 or max_document_bytes < 1:
            raise DataError("--max-bad-lines must be at least 0 and --max-document-mb above 0; mend the command")
        self.paths = [Path(path) for path in paths]
        self.json_key = json_key
        self.max_bad_lines = max_bad_lines
        self.max_document_bytes = max_document_bytes
        self.report = CorpusReport()
        for path in self.paths:
            _check_input(path)
        self.total_bytes = sum(path.stat().st_size for path in self.paths)

    def documents(self) -> Iterator[str]:
        """Yield each document's text, never empty; `report` follows along and starts anew with each pass.

        Raises:
            DataError: a bad line beyond `max_bad_lines`, or a file that is cut or damaged.
        """
        self.report = CorpusReport()
        for path in self.paths:
            texts = self._parquet_texts(path) if _kind(path) == ".parquet" else self._stream_texts(path)
            for text in texts:
                if text:
                    self.report.documents += 1
                    yield text
                else:
                    self.report.empty_documents += 1

    def _stream_texts(self, path: Path) -> Iterator[str]:
        with open(path, "rb", buffering=0) as file:
            raw = _HashedFile(file, self.report)
            chunks = _reporting_damage(path, _decompressed(path, io.BufferedReader(raw, _CHUNK_BYTES)))
            if _kind(path) == ".txt":
                yield from self._whole_file(path, chunks)
            else:
                yield from self._json_lines(path, chunks)
            self.report.files.append(InputFile(path.name, raw.bytes_read, raw.sha256.hexdigest()))

    def _whole_file(self, path: Path, chunks: Iterator[bytes]) -> Iterator[str]:
        held: list[bytes] = []
        size = 0
        for chunk in chunks:
            size += len(chunk)
            if size > self.max_document_bytes:
                what = f"the text is longer than {self.max_document_bytes} bytes, and a .txt file is one document"
                raise DataError(f"{path}: {what}; split it, or make it a .jsonl of documents")
            held.append(chunk)
        try:
            yield b"".join(held).removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
        except UnicodeDecodeError as error:
            self._bad_line(path, 1, f"invalid UTF-8 at byte {error.start}")

    def _json_lines(self, path: Path, chunks: Iterator[bytes]) -> Iterator[str]:
        for number, raw_line in enumerate(_lines(chunks, self.max_document_bytes), start=1):
            if raw_line is None:
                self._bad_line(path, number, self._too_long("line"))
                continue
            line = raw_line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw_line
            if not line.strip():
                continue
            found = self._text_of(line)
            if isinstance(found, _Bad):
                self._bad_line(path, number, found.reason)
            else:
                yield found

    def _text_of(self, line: bytes) -> str | _Bad:
        try:
            record: Any = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            return _Bad(_why_no_json(line, error))
        if not isinstance(record, dict):
            return _Bad(f"wanted a JSON object with the key `{self.json_key}`, found {_json_kind(record)}")
        if self.json_key not in record:
            keys = ", ".join(_shown(key) for key in list(record)[:8]) or "none"
            return _Bad(f"no key `{self.json_key}` (keys here: {keys}; choose with --json-key)")
        text = record[self.json_key]
        if not isinstance(text, str):
            return _Bad(f"`{self.json_key}` must be a string, found {_json_kind(text)}")
        return text

    def _too_long(self, what: str) -> str:
        return f"the {what} is longer than {self.max_document_bytes} bytes (--max-document-mb)"

    def _parquet_texts(self, path: Path) -> Iterator[str]:
        try:
            import pyarrow  # pyright: ignore[reportMissingImports]
            import pyarrow.parquet  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise DataError(f"{path}: reading parquet needs pyarrow; pip install 'megadiff[parquet]'") from None
        try:
            with pyarrow.parquet.ParquetFile(path) as table:
                names = table.schema_arrow.names
                if self.json_key not in names:
                    listed = ", ".join(names[:8])
                    raise DataError(
                        f"{path}: no column `{self.json_key}` (columns here: {listed}); choose with --json-key"
                    )
                row = 0
                for batch in table.iter_batches(batch_size=256, columns=[self.json_key]):
                    for text in batch.column(0).to_pylist():
                        row += 1
                        if not isinstance(text, str):
                            self._bad_line(path, row, f"`{self.json_key}` must be a string, found {_json_kind(text)}")
                        elif len(text.encode("utf-8")) > self.max_document_bytes:
                            self._bad_line(path, row, self._too_long("text"))
                        else:
                            yield text
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: the parquet file is cut or damaged ({error}); fetch or make it again") from error
        with open(path, "rb", buffering=0) as file:
            raw = _HashedFile(file, self.report)
            while raw.read(_CHUNK_BYTES):
                pass
            self.report.files.append(InputFile(path.name, raw.bytes_read, raw.sha256.hexdigest()))

    def _bad_line(self, path: Path, number: int, reason: str) -> None:
        report = self.report
        report.bad_lines += 1
        if len(report.bad_examples) < _MAX_LISTED:
            report.bad_examples.append(f"{path}:{number}: {reason}")
        if report.bad_lines > self.max_bad_lines:
            allowed = f"{self.max_bad_lines} bad lines are allowed and this is one more"
            raise DataError(f"{path}:{number}: {reason}; mend the line or raise --max-bad-lines ({allowed})")


@dataclass(frozen=True)
class _Bad:
    reason: str


class _HashedFile(io.RawIOBase):
    """A file that counts and hashes what is read from it, so that hashing costs no second pass."""

    def __init__(self, file: io.FileIO, report: CorpusReport) -> None:
        self._file = file
        self._report = report
        self.sha256 = hashlib.sha256()
        self.bytes_read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:count])
        self.bytes_read += count
        self._report.bytes_read += count
        return count


def _kind(path: Path) -> str:
    name = path.name.lower()
    return Path(name.removesuffix(".gz").removesuffix(".zst")).suffix


def _check_input(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path}: wanted a file, found a folder; name its files, for example {path}/*.jsonl")
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path after --input")
    kinds = (*_JSON_SUFFIXES, ".txt", ".parquet")
    if _kind(path) not in kinds:
        wanted = ", ".join(kinds)
        raise DataError(f"{path}: wanted a name that ends in one of {wanted} (also with .gz or .zst); rename the file")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _decompressed(path: Path, raw: io.BufferedReader) -> Iterator[bytes]:
    suffix = path.suffix.lower()
    if suffix in (".gz", ".zst") and not raw.peek(1):
        raise EOFError("the file is empty")
    if suffix == ".zst":
        yield from _zstd_chunks(raw)
        return
    stream = gzip.GzipFile(fileobj=raw, mode="rb") if suffix == ".gz" else raw
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


def _zstd_chunks(raw: io.BufferedReader) -> Iterator[bytes]:
    """Decompress frame after frame; the library's own stream reader takes a cut frame for a whole one."""
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


def _lines(chunks: Iterable[bytes], limit: int) -> Iterator[bytes | None]:
    """Lines without their newline; None for a line of more than `limit` bytes, which is never held whole."""
    held: list[bytes] = []
    held_bytes = 0
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            yield None if held_bytes + len(end) > limit else b"".join([*held, end])
            held, held_bytes = [], 0
        held_bytes += len(rest)
        held = [*held, rest] if held_bytes <= limit else []
    if held_bytes:
        yield None if held_bytes > limit else b"".join(held)


def _why_no_json(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as bad:
        return f"invalid UTF-8 at byte {bad.start} of the line"
    return f"not a JSON object ({error})"


def _shown(key: str) -> str:
    """A key as a message can hold it, whatever a corpus calls it."""
    return key if key.isprintable() and len(key) <= 40 else f"{key[:40]!r}"


def _json_kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "an object")
