"""Text documents read from corpus files, one after another, in memory bounded by the largest document.

Kinds, by the file's name: `.jsonl` (also `.json`, `.ndjson`: one JSON object per line), `.txt` (one file is one
document unless `text_split` cuts it at lines or blank lines), `.csv` and `.tsv` (one document per record after a line
of column names), each also as `.gz`, `.zst`, `.bz2` or `.xz`, and `.parquet` and `.arrow` (one document per row; needs
pyarrow). The path `-` is standard input, which holds JSON lines.

A UTF-8 byte-order mark at the start of a file is dropped, Windows line ends between JSON lines are accepted, blank
lines are ignored, and a document with empty text is skipped and counted. Any other fault makes a bad line: counted,
listed, and refused beyond `max_bad_lines`. A damaged or truncated compressed stream is always refused.

Filters (`DocumentFilters`) depend on the text alone, so the same text is treated the same wherever it occurs.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megadiff.data.corpus_files import (
    Bad,
    Line,
    TextFields,
    csv_records,
    even_chunks,
    invalid_utf8,
    kept_ends,
    line_blocks,
    split_json_lines,
    split_lines,
    table_rows,
    text_of,
)
from megadiff.data.corpus_streams import (
    CHUNK_BYTES,
    CSV_SUFFIXES,
    STDIN,
    TABLE_SUFFIXES,
    CorpusPath,
    HashedFile,
    check_input,
    corpus_path,
    count_lines,
    kind_of,
    open_input,
    size_of,
    unpacked,
)
from megadiff.errors import DataError

SPLITS = ("train", "valid")
"""Splits of a corpus of which a fraction is held out; the first is the default."""

DIGEST_BYTES = 16
"""Size of a document's digest. Among 10**10 different texts two have the same digest with a chance of 10**-19."""


def digest(text: str) -> bytes:
    """Return the digest of a text: BLAKE2b of its UTF-8 bytes."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True)
class DocumentFilters:
    """Rules by which documents are left out.

    Raises:
        DataError: a number is out of its range.
    """

    min_characters: int = 0
    """Least number of characters."""

    max_characters: int | None = None
    """Largest number of characters; None for any."""

    valid_fraction: float = 0.0
    """Share of the documents that is held out for validation, from 0 to below 1."""

    split: str = SPLITS[0]
    """The split to keep: `train` or `valid`."""

    def __post_init__(self) -> None:
        if not 0 <= self.valid_fraction < 1:
            raise DataError(f"--valid-fraction must be from 0 to below 1, found {self.valid_fraction:g}")
        if self.split == "valid" and not self.valid_fraction:
            raise DataError("--split valid: wanted --valid-fraction above 0 beside it, found none; give the fraction")
        least = max(1, self.min_characters)
        if self.min_characters < 0 or (self.max_characters is not None and self.max_characters < least):
            found = f"{self.min_characters} and {self.max_characters}"
            raise DataError(f"--min-characters must be at least 0 and at most --max-characters, found {found}")

    def reason_to_drop(self, text: str) -> str | None:
        """Return why a text is left out, as the name of a count of `CorpusReport`; None if it is kept."""
        if len(text) < self.min_characters:
            return "too_short"
        if self.max_characters is not None and len(text) > self.max_characters:
            return "too_long"
        if self.valid_fraction:
            # The last eight bytes: the first ones sort duplicates into groups, which each split should fill evenly.
            is_held_out = int.from_bytes(digest(text)[8:], "little") < self.valid_fraction * 2**64
            if is_held_out != (self.split == "valid"):
                return "other_split"
        return None


NO_FILTERS = DocumentFilters()
"""Filters that keep every document."""


MAX_DOCUMENT_BYTES = 2**28
"""Default limit on a line, text file or row, which is held in memory; a longer one is surely an accident."""

TEXT_SPLITS = ("file", "line", "blank-line")
"""Ways to cut a `.txt` file into documents; the first is the default."""

MAX_LISTED = 20
"""Number of bad lines that a report lists."""

SKIPPED = (
    "empty_documents", "bad_lines", "too_short", "too_long", "other_split", "duplicates", "repaired_documents"
)  # fmt: skip
"""Counts of a `CorpusReport` that add up over the parts of a corpus, beside its documents."""
_SAMPLED_FILES, _SAMPLED_CHARACTERS, _SAMPLED_PART = 16, 2**17, 256
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """One document and the place it was read from."""

    text: str

    path: CorpusPath
    """The corpus file."""

    line: int
    """Line, or row, of the file on which the document starts, from 1."""

    number: int
    """Number of the document within its file, from 1; empty ones count."""


@dataclass(frozen=True)
class InputFile:
    """A file that was read: its name without the folder, its size, and its SHA-256 as stored on disk."""

    name: str
    bytes: int
    sha256: str

    documents: int = 0
    """Number of documents read from it."""


@dataclass
class CorpusReport:
    """Counts of a pass over a corpus so far."""

    documents: int = 0
    """Number of documents yielded."""

    empty_documents: int = 0
    """Number of documents skipped because their text is empty."""

    bad_lines: int = 0
    """Number of lines skipped because they hold no usable text."""

    bad_examples: list[str] = field(default_factory=list)
    """The first of them, at most 20, as `file:line: reason`."""

    too_short: int = 0
    """Number of documents left out because they have too few characters."""

    too_long: int = 0
    """Number of documents left out because they have too many characters."""

    other_split: int = 0
    """Number of documents that belong to the other split."""

    duplicates: int = 0
    """Number of documents left out because an earlier one has the same text."""

    repaired_documents: int = 0
    """Number of documents in which halves of surrogate pairs were replaced by U+FFFD."""

    bytes_read: int = 0
    """Number of bytes read from disk (compressed if the file is)."""

    files: list[InputFile] = field(default_factory=list)
    """Files that were read to their end."""


class Corpus:
    """Documents of several files in the order given.

    Args:
        paths: files and URLs; the module's docstring lists the kinds.
        json_key: the key (jsonl) or column (tables) that holds the text.
        template: text with several keys or columns in braces, used in place of the one.
        fields: fields that make a document, used in place of the key and the template.
        text_split: how a `.txt` file is split into documents: `file`, `line`, or `blank-line`.
        max_bad_lines: bad lines to skip over all files before the pass is refused; 0 refuses the first.
        max_document_bytes: uncompressed size of a line, text file or row; a longer one is a bad line, and no more than
            this is held of it.
        filters: documents to leave out by their text; none by default.
        span: first byte and end of the part to read, which must begin and end with whole lines; only for one
            uncompressed file whose documents are lines.

    Raises:
        DataError: no files are given, or a file is missing, unreadable, a folder, or of an unknown kind.
    """

    def __init__(
        self,
        paths: Sequence[str | CorpusPath],
        *,
        json_key: str = "text",
        template: str | None = None,
        fields: TextFields | None = None,
        text_split: str = "file",
        max_bad_lines: int = 0,
        max_document_bytes: int = MAX_DOCUMENT_BYTES,
        filters: DocumentFilters = NO_FILTERS,
        span: tuple[int, int] | None = None,
    ) -> None:
        if not paths:
            raise DataError("no input files were given; name at least one .jsonl, .txt or .parquet file")
        if max_bad_lines < 0 or max_document_bytes < 1:
            raise DataError("--max-bad-lines must be at least 0 and --max-document-mb above 0; correct the command")
        if text_split not in TEXT_SPLITS:
            raise DataError(f"--text-split must be one of {', '.join(TEXT_SPLITS)}; found `{text_split}`")
        self.paths = [corpus_path(path) for path in paths]
        self.json_key = json_key
        self.template = template
        self._fields = fields or TextFields.of(json_key, template)
        self.text_split = text_split
        self.max_bad_lines = max_bad_lines
        self.max_document_bytes = max_document_bytes
        self.filters = filters
        self.duplicates: Container[int] = ()
        """Numbers, among the documents that pass the filters, of those that are left out as duplicates."""
        self.span = span
        self.bad_lines_before = 0
        """Number of bad lines in other parts of the corpus, which count towards the limit."""
        self._lines_before: int | None = None
        self.report = CorpusReport()
        for path in self.paths:
            check_input(path)
        self.total_bytes = span[1] - span[0] if span else sum(map(size_of, self.paths))

    def documents(self) -> Iterator[str]:
        """Yield the text of each document, never empty; `report` is updated as it goes and reset with each pass.

        Raises:
            DataError: a bad line beyond `max_bad_lines`, or a truncated or damaged file.
        """
        for document in self.located_documents():
            yield document.text

    def located_documents(self) -> Iterator[Document]:
        """Yield the same documents as `documents`, each with its place in the corpus."""
        self.report = CorpusReport()
        passed = 0
        for path in self.paths:
            read = self._table_documents if kind_of(path) in TABLE_SUFFIXES else self._stream_documents
            for number, (line, text) in enumerate(read(path), start=1):
                if not text:
                    self.report.empty_documents += 1
                    continue
                if (reason := self.filters.reason_to_drop(text)) is not None:
                    setattr(self.report, reason, getattr(self.report, reason) + 1)
                    continue
                if passed in self.duplicates:
                    self.report.duplicates += 1
                else:
                    self.report.documents += 1
                    yield Document(text, path, line, number)
                passed += 1

    def skip(self, document: Document, reason: str) -> None:
        """Count a yielded document that turned out to be unusable as a bad line.

        Args:
            document: the document at fault.
            reason: the fault, worded to follow the document's place.

        Raises:
            DataError: bad lines exceed `max_bad_lines`.
        """
        self.report.documents -= 1
        of = f"the part from byte {self.span[0]} on" if self.span and self.span[0] else "the file"
        self._bad_line(document.path, document.line, Bad(f"document {document.number} of {of}: {reason}"))

    def _stream_documents(self, path: CorpusPath) -> Iterator[tuple[int, str]]:
        found = 0
        with open_input(path) as file:
            if self.span is not None:
                file.seek(self.span[0])
            limit = None if self.span is None else self.span[1] - self.span[0]
            raw = HashedFile(file, self._count_bytes, limit=limit)
            chunks = even_chunks(unpacked(path, io.BufferedReader(raw, CHUNK_BYTES)))
            for line, text in self._cut(path, chunks):
                found += bool(text)
                yield line, text
            self.report.files.append(InputFile(path.name, raw.bytes_read, raw.sha256.hexdigest(), found))

    def _cut(self, path: CorpusPath, chunks: Iterator[bytes]) -> Iterator[tuple[int, str]]:
        """Yield (line, text) of each document of an uncompressed stream."""
        if kind_of(path) in CSV_SUFFIXES:
            return self._csv_records(path, chunks)
        if kind_of(path) != ".txt":
            return self._json_lines(path, chunks)
        ways = {"file": self._whole_file, "line": self._text_lines, "blank-line": self._text_blocks}
        return ways[self.text_split](path, chunks)

    def _whole_file(self, path: CorpusPath, chunks: Iterator[bytes]) -> Iterator[tuple[int, str]]:
        """Yield all of a text file as one document, without its bad lines."""
        parts: list[str] = []
        first_line, offset = 1, 0
        for block in line_blocks(chunks, self.max_document_bytes):
            if block is None:
                advice = "cut it into documents with --text-split line or blank-line"
                what = f"the text is longer than {self.max_document_bytes} bytes (--max-document-mb)"
                self._bad_line(path, 1, Bad(f"{what}, and a .txt file is one document", advice))
                return
            try:
                parts.append(block.decode("utf-8"))
            except UnicodeDecodeError:
                parts.extend(self._good_lines(path, block, first_line, offset))
            first_line += block.count(b"\n")
            offset += len(block)
            del block
        yield 1, "".join(parts).removeprefix("\ufeff")

    def _good_lines(self, path: CorpusPath, block: bytes, first_line: int, offset: int) -> Iterator[str]:
        """Yield the lines of a block that are UTF-8; count the others as bad lines."""
        for number, line in enumerate(kept_ends(block), start=first_line):
            bad = invalid_utf8(line, of="file", offset=offset)
            offset += len(line)
            if bad is None:
                yield line.decode("utf-8")
            else:
                self._bad_line(path, number, bad)

    def _text_lines(self, path: CorpusPath, chunks: Iterator[bytes]) -> Iterator[tuple[int, str]]:
        for number, line, bad in self._decoded_lines(path, chunks):
            if bad is not None:
                self._bad_line(path, number, bad)
            elif line.strip():
                yield number, line.removesuffix("\r")

    def _text_blocks(self, path: CorpusPath, chunks: Iterator[bytes]) -> Iterator[tuple[int, str]]:
        """Yield the paragraphs between blank lines; a paragraph with a bad line is dropped."""
        block = _TextBlock(self.max_document_bytes)
        for number, line, bad in self._decoded_lines(path, chunks):
            if bad is None and not line.strip():
                yield from self._ended(path, block)
                block = _TextBlock(self.max_document_bytes)
            else:
                block.add(number, line, bad)
        yield from self._ended(path, block)

    def _ended(self, path: CorpusPath, block: _TextBlock) -> Iterator[tuple[int, str]]:
        if block.is_too_long:
            self._bad_line(path, block.first_line, Bad(self._too_long("document")))
        elif block.bad is not None:
            self._bad_line(path, *block.bad)
        elif block.lines:
            yield block.first_line, "\n".join(block.lines).removesuffix("\r")

    def _decoded_lines(self, path: CorpusPath, chunks: Iterator[bytes]) -> Iterator[tuple[int, str, Bad | None]]:
        """Yield (number, text, None) of each line, or (number, "", the reason) of a bad one."""
        offset = self.span[0] if self.span else 0
        for number, line in enumerate(split_lines(chunks, self.max_document_bytes), start=1):
            if line.content is None:
                yield number, "", Bad(self._too_long("line"))
            else:
                bad = invalid_utf8(line.content, of="file", offset=offset)
                text = "" if bad else line.content.decode("utf-8")
                yield number, text.removeprefix("\ufeff") if number == 1 and not self._is_later_part else text, bad
            offset += line.num_bytes + 1

    def _json_lines(self, path: CorpusPath, chunks: Iterator[bytes]) -> Iterator[tuple[int, str]]:
        number = 0  # counted by hand: `enumerate` would keep a reference to the last line, which may be long
        split = split_lines if self._fields.are_nested else split_json_lines
        for line in split(chunks, self.max_document_bytes):
            number += 1
            if line.content is None:
                self._bad_line(path, number, Bad(self._too_long("line")))
                continue
            if number == 1 and line.content.startswith(_BYTE_ORDER_MARK) and not self._is_later_part:
                line = Line(line.content.removeprefix(_BYTE_ORDER_MARK), line.num_bytes - len(_BYTE_ORDER_MARK))
            if not line.content or line.content.isspace():
                continue
            found = text_of(line, self._fields)
            del line  # frees the line before the text is used
            if isinstance(found, Bad):
                self._bad_line(path, number, found)
            else:
                self.report.repaired_documents += found.is_repaired
                yield number, found.text

    def _too_long(self, what: str) -> str:
        return f"the {what} is longer than {self.max_document_bytes} bytes (--max-document-mb)"

    def _table_documents(self, path: CorpusPath) -> Iterator[tuple[int, str]]:
        found = 0
        for row, values in enumerate(table_rows(path, self._fields), start=1):
            text = self._text_of_row(path, row, values)
            if text is not None:
                found += bool(text)
                yield row, text
        with open_input(path) as file:
            raw = HashedFile(file, self._count_bytes)
            while raw.read(CHUNK_BYTES):
                pass
            self.report.files.append(InputFile(path.name, raw.bytes_read, raw.sha256.hexdigest(), found))

    def _text_of_row(self, path: CorpusPath, row: int, values: Sequence[Any]) -> str | None:
        """Return the text of a row; None, and a bad line, if it has none."""
        for name, value in zip(self._fields.names, values, strict=True):
            if (fault := self._fields.fault_of(name, value)) is not None:
                self._bad_line(path, row, Bad(fault))
                return None
        text = self._fields.text(values)
        if utf8_length(text) > self.max_document_bytes:
            self._bad_line(path, row, Bad(self._too_long("text")))
            return None
        return text

    def _csv_records(self, path: CorpusPath, chunks: Iterator[bytes]) -> Iterator[tuple[int, str]]:
        def lines() -> Iterator[str]:
            for number, line, bad in self._decoded_lines(path, chunks):
                if bad is not None:
                    self._bad_line(path, number, bad)
                yield line + "\n"

        for number, values in csv_records(path, lines(), self._fields, max_field_bytes=self.max_document_bytes):
            text = self._text_of_row(path, number, values)
            if text is not None:
                yield number, text

    def _count_bytes(self, count: int) -> None:
        self.report.bytes_read += count

    def _bad_line(self, path: CorpusPath, number: int, bad: Bad) -> None:
        report = self.report
        number += self._lines_before_span() if self._is_later_part else 0
        report.bad_lines += 1
        if len(report.bad_examples) < MAX_LISTED:
            report.bad_examples.append(f"{path}:{number}: {bad.reason}")
        if report.bad_lines + self.bad_lines_before > self.max_bad_lines:
            allowed = f"{self.max_bad_lines} bad lines are allowed and this is one more"
            raise DataError(f"{path}:{number}: {bad.reason}; {bad.remedy} or raise --max-bad-lines ({allowed})")

    @property
    def _is_later_part(self) -> bool:
        """Whether what is read begins inside a file."""
        return self.span is not None and self.span[0] > 0

    def _lines_before_span(self) -> int:
        """Return the number of lines before the part of the file that is read; counted when the first is bad."""
        if self._lines_before is None:
            assert self.span is not None
            self._lines_before = count_lines(self.paths[0], self.span[0])
        return self._lines_before


def utf8_length(text: str) -> int:
    """Return the number of bytes of a text in UTF-8, without encoding a long text at once."""
    if text.isascii():
        return len(text)
    return sum(len(text[start : start + CHUNK_BYTES].encode("utf-8")) for start in range(0, len(text), CHUNK_BYTES))


def sample(corpus: Corpus) -> list[str]:
    """Return the first documents of up to 16 files spread evenly over a corpus; none from a pipe, which is read once.

    Of each file, 131,072 characters are taken. All files together give at most that or, if it is more, a 256th of the
    corpus, since encoding the sample takes many times as long as the rest. A document beyond that is cut. A bad line
    ends the documents of its file: it is reported when the corpus is read.
    """
    files = [path for path in corpus.paths if path != STDIN and path.is_file()]
    found: list[str] = []
    places = sorted({len(files) * number // _SAMPLED_FILES for number in range(_SAMPLED_FILES)} if files else ())
    together = max(_SAMPLED_CHARACTERS, corpus.total_bytes // _SAMPLED_PART)
    for place in places:
        part = Corpus(
            [files[place]],
            json_key=corpus.json_key,
            template=corpus.template,
            text_split=corpus.text_split,
            max_document_bytes=corpus.max_document_bytes,
        )
        left = min(_SAMPLED_CHARACTERS, together // len(places))
        with suppress(DataError):
            for text in part.documents():
                found.append(text[:left])
                left -= len(text)
                if left <= 0:
                    break
    return found


class _TextBlock:
    """Lines of a text file up to a blank one."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self.first_line = 0
        self.lines: list[str] = []
        self.bad: tuple[int, Bad] | None = None
        self.is_too_long = False

    def add(self, number: int, line: str, bad: Bad | None) -> None:
        """Add the next line, or only the fact that it is bad."""
        self.first_line = self.first_line or number
        if bad is not None:
            self.bad = self.bad or (number, bad)
        self._left -= utf8_length(line) + 1
        self.is_too_long = self.is_too_long or self._left < -1
        if self.bad is not None or self.is_too_long:
            self.lines.clear()
        else:
            self.lines.append(line)
