"""Records of corpus files: lines, the text of a JSON line, rows of tables, records of CSV files.

`orjson` is several times faster and reads nearly every line; what it refuses but Python or pandas write (NaN, Infinity,
numbers beyond a double, halves of surrogate pairs) is read by `json`. The result is the same in both cases, and also if
`orjson` is not installed.

A long JSON line is reduced to its top level: the contents of arrays and objects beside the text are dropped while
they are read, since a corpus may carry many megabytes of them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Protocol

import numpy as np

from megadiff.data.corpus_streams import CHUNK_BYTES, CorpusPath, RemotePath, kind_of, open_buffered
from megadiff.errors import DataError

try:
    import orjson
except ImportError:  # pragma: no cover - tests set the name to None instead
    orjson = None

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_SHOWN = 8
_PLAIN = json.JSONDecoder(parse_int=lambda digits: 0, parse_float=lambda digits: 0.0)

LONG_LINE_BYTES = 2**20
"""JSON lines above this size are reduced to their top level while they are read."""

_BLOCK_BYTES = 2**17  # bytes of a long line that are processed together, with four bytes of arrays for each
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_STRUCTURE = np.zeros(256, dtype=np.int8)
_STRUCTURE[list(b"[{")] = 1
_STRUCTURE[list(b"]}")] = -1


@dataclass(frozen=True)
class Bad:
    """The reason why a line has no usable text, and a remedy."""

    reason: str
    remedy: str = "correct the line"


@dataclass(frozen=True)
class Text:
    """The text of a line."""

    text: str
    is_repaired: bool = False
    """Whether halves of surrogate pairs, which are not characters, were replaced by U+FFFD."""


@dataclass(frozen=True)
class TextFields:
    """The fields of an object or a row that make a document's text."""

    names: tuple[str, ...]
    """Names of the fields."""

    template: str | None = None
    """Text with the fields in braces, as `{title}: {text}`; None for the only field alone."""

    @staticmethod
    def of(key: str, template: str | None) -> TextFields:
        """Return the fields for `--json-key` or, where it is given, for `--template`.

        Raises:
            DataError: the template names no field, or has something else in braces.
        """
        if template is None:
            return TextFields((key,))
        remedy = "write for example '{title}\\n\\n{text}', and double a brace that is text"
        try:
            parts = list(Formatter().parse(template))
        except ValueError as error:
            raise DataError(f"--template {template!r}: {error}; {remedy}") from error
        names = tuple(dict.fromkeys(name for _, name, _, _ in parts if name is not None))
        is_plain = all(not layout and not conversion for _, _, layout, conversion in parts)
        if not names or "" in names or not is_plain or any(re.search(r"[.\[\]]", name) for name in names):
            raise DataError(f"--template {template!r}: wanted names of fields in braces and nothing else; {remedy}")
        return TextFields(names, template)

    @property
    def option(self) -> str:
        """Option of the command line that names the fields."""
        return "--json-key" if self.template is None else "--template"

    @property
    def are_nested(self) -> bool:
        """Whether fields may be arrays or objects."""
        return False

    def fault_of(self, name: str, value: Any) -> str | None:
        """Return why the value of a field cannot be used, worded to follow its place; None if it can."""
        return None if isinstance(value, str) else f"`{name}` must be a string, found {json_kind(value)}"

    def text(self, values: Sequence[Any]) -> str:
        """Return the text for the fields' values."""
        if self.template is None:
            return values[0]
        return self.template.format_map(dict(zip(self.names, values, strict=True)))


def text_of(line: Line, fields: TextFields) -> Text | Bad:
    """Return the text that the fields of a JSON object make.

    Args:
        line: a line with content, without a byte-order mark.
        fields: its strings; if an object has several of one name, the last one counts, as in Python.
    """
    content = line.content
    assert content is not None
    found = parse_json_line(content)
    if isinstance(found, NotJson):
        return invalid_utf8(content, of="line", is_whole=line.num_bytes == len(content)) or Bad(
            f"not a JSON object ({found.why})"
        )
    if not isinstance(found, dict):
        hint = "; write one object a line (in pandas: orient='records', lines=True)" if isinstance(found, list) else ""
        return Bad(f"wanted a JSON object with the key `{fields.names[0]}`, found {json_kind(found)}{hint}")
    values = []
    for key in fields.names:
        if key not in found:
            keys = ", ".join(shown(name) for name in list(found)[:_MAX_SHOWN]) or "none"
            chat = next((name for name, value in found.items() if is_chat(value) and not fields.are_nested), None)
            hint = "" if chat is None else f", or for messages --chat-key {shown(chat)}"
            return Bad(f"no key `{key}` (keys here: {keys}; choose with {fields.option}{hint})")
        if (fault := fields.fault_of(key, found[key])) is not None:
            return Bad(fault)
        values.append(found[key])
    text = fields.text(values)
    whole = without_lone_surrogates(text)
    return Text(whole, is_repaired=whole != text)


def is_chat(value: Any) -> bool:
    """Return whether a value looks like the messages of a conversation: a list of objects with a role."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def without_lone_surrogates(text: str) -> str:
    """Return the text with U+FFFD in place of halves of surrogate pairs, which no encoding can represent."""
    return text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text)


def invalid_utf8(content: bytes, *, of: str, is_whole: bool = True, offset: int = 0) -> Bad | None:
    """Return the first byte that is not UTF-8, as a bad line; None if there is none.

    Args:
        of: the unit in which bytes are counted, such as `line`.
        is_whole: whether `content` is the complete unit, so that positions in it are meaningful to a reader.
        offset: position of the first byte of `content`.
    """
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f" at byte {offset + error.start} of the {of}" if is_whole else ""
        value = f"0x{content[error.start]:02x}"
        encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        return Bad(
            f"invalid UTF-8{place} ({value})",
            f"convert the file (for example iconv -f {encoding} -t utf-8 OLD > NEW)",
        )
    return None


def shown(key: str) -> str:
    """Return a key in a form that fits a message, whatever a corpus contains."""
    return key if key.isprintable() and len(key) <= 40 else f"{key[:40]!r}"


def json_kind(value: Any) -> str:
    """Return the name of a JSON value's kind, for messages."""
    kinds = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "an object")


@dataclass(frozen=True)
class NotJson:
    """The reason why a line is not JSON."""

    why: str


def parse_json_line(content: bytes) -> Any:
    """Return the value of a line as Python and pandas write it, `NaN` and `Infinity` included, or a `NotJson`."""
    if orjson is not None:
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError:
            pass
    try:
        return _PLAIN.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return NotJson(f"invalid UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return NotJson(f"{error.msg} at character {error.pos}")
    except RecursionError:
        return _flattened(content)


def _flattened(content: bytes) -> Any:
    """Read a line that nests too deeply, without its nested values; text is never below the top level."""
    reduced = TopLevel()(content)
    if reduced == content:
        return NotJson("nested too deeply")
    try:
        return _PLAIN.decode(reduced.decode("utf-8"))
    except (ValueError, RecursionError):
        return NotJson("nested too deeply")


@dataclass(frozen=True)
class Line:
    """One line without its newline."""

    content: bytes | None
    """The bytes that were kept; None for a line above the limit, which is never held whole."""

    num_bytes: int
    """Size of the line in the file; larger than its content if nested values were dropped."""


class _Reducer(Protocol):
    def __call__(self, piece: bytes) -> bytes: ...


def even_chunks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the same bytes in pieces of `CHUNK_BYTES`, so that neither many tiny pieces nor a huge one is costly.

    Args:
        chunks: pieces of any size.
    """
    held: list[bytes] = []
    held_bytes = 0
    for chunk in chunks:
        held.append(chunk)
        held_bytes += len(chunk)
        if held_bytes < CHUNK_BYTES:
            continue
        joined = chunk if len(held) == 1 else b"".join(held)
        whole = held_bytes - held_bytes % CHUNK_BYTES
        for start in range(0, whole, CHUNK_BYTES):
            yield joined[start : start + CHUNK_BYTES]
        held, held_bytes = [joined[whole:]], held_bytes - whole
    if held_bytes:
        yield b"".join(held)


def split_lines(
    chunks: Iterable[bytes], limit: int, *, reducer: Callable[[], _Reducer] | None = None
) -> Iterator[Line]:
    """Yield the lines of a byte stream.

    Args:
        chunks: pieces of the file in order.
        limit: largest size of a line that is held, in bytes as stored in the file.
        reducer: factory of a function that drops part of a line above `LONG_LINE_BYTES`; the function is called with
            the pieces of one line in order.
    """
    held = _HeldLine(limit, reducer)
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            if held.num_bytes or len(end) > min(limit, LONG_LINE_BYTES):
                held.add(end)
                yield held.take()
            else:
                yield Line(end, len(end))
        if rest:
            held.add(rest)
    if held.num_bytes:
        yield held.take()


def split_json_lines(chunks: Iterable[bytes], limit: int) -> Iterator[Line]:
    """Yield the lines of a `.jsonl` stream, long ones reduced to the top level of their object.

    A reduced line is valid JSON: every array or object inside the outermost one is empty. The reduction counts
    brackets and tracks strings; dropped content is not parsed otherwise.
    """
    return split_lines(chunks, limit, reducer=TopLevel)


def line_blocks(chunks: Iterable[bytes], limit: int) -> Iterator[bytes | None]:
    """Yield the same bytes in blocks that end at line ends; None, and nothing more, beyond `limit` bytes in total."""
    held: list[bytes] = []
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > limit:
            held.clear()
            continue  # read to the end nevertheless, to detect damage and to complete the hash
        end = chunk.rfind(b"\n") + 1
        if end:
            held.append(chunk[:end])
            yield _joined(held)
        held.append(chunk[end:])
    if size > limit:
        yield None
    elif size:
        yield _joined(held)


def _joined(held: list[bytes]) -> bytes:
    """Return the pieces as one, and clear the list."""
    joined = b"".join(held)
    held.clear()
    return joined


def kept_ends(block: bytes) -> list[bytes]:
    """Return lines with their newlines; `bytes.splitlines` would also split at single carriage returns."""
    *lines, last = block.split(b"\n")
    return [*(line + b"\n" for line in lines), *([last] if last else [])]


class _HeldLine:
    """A line whose end has not been read yet."""

    def __init__(self, limit: int, reducer: Callable[[], _Reducer] | None) -> None:
        self._limit, self._make_reducer = limit, reducer
        self._clear()

    def _clear(self) -> None:
        self.num_bytes = 0
        self._parts: list[bytes] = []
        self._reduce: _Reducer | None = None

    def add(self, piece: bytes) -> None:
        """Hold another piece; of a line above the limit nothing is held."""
        self.num_bytes += len(piece)
        if self.num_bytes > self._limit:
            self._parts.clear()
            return
        if self._reduce is None and self._make_reducer is not None and self.num_bytes > LONG_LINE_BYTES:
            self._reduce = self._make_reducer()
            self._parts = [self._reduce(part) for part in self._parts]
        self._parts.append(piece if self._reduce is None else self._reduce(piece))

    def take(self) -> Line:
        """Return the line, and start the next."""
        parts, size = self._parts, self.num_bytes
        self._clear()
        if size > self._limit:
            return Line(None, size)
        return Line(parts[0] if len(parts) == 1 else b"".join(parts), size)


class TopLevel:
    """Reducer that drops the contents of arrays and objects inside the outermost one, piece by piece."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def __call__(self, piece: bytes) -> bytes:
        """Return the part of the next piece of the line that is kept."""
        kept = [self._block(piece[start : start + _BLOCK_BYTES]) for start in range(0, len(piece), _BLOCK_BYTES)]
        return kept[0] if len(kept) == 1 else b"".join(kept)

    def _block(self, block: bytes) -> bytes:
        if self._in_string and b'"' not in block and b"\\" not in block:
            self._is_escaped = False
            return block if self._depth <= 1 else b""
        found = np.frombuffer(block, dtype=np.uint8)
        is_quote = found == _QUOTE
        if self._is_escaped or b"\\" in block:
            is_quote &= ~self._escaped(found)
        in_string = (np.cumsum(is_quote, dtype=np.int32) + self._in_string) & 1
        steps = np.where(in_string, 0, _STRUCTURE[found])
        depth = self._depth + np.cumsum(steps, dtype=np.int32)
        self._in_string, self._depth = bool(in_string[-1]), int(depth[-1])
        is_kept = np.minimum(depth, depth - steps) <= 1
        return block if is_kept.all() else found[is_kept].tobytes()

    def _escaped(self, found: np.ndarray) -> np.ndarray:
        """Mark the bytes after an odd run of backslashes: [n] bool; remember whether the next block starts with one."""
        places = np.arange(found.size, dtype=np.int32)
        last_other = np.maximum.accumulate(np.where(found != _BACKSLASH, places, np.int32(-1)))
        run = places - last_other  # number of backslashes that end at each place
        begins_escaped = self._is_escaped & (last_other < 0)
        run += begins_escaped  # the run continues from the previous block
        is_odd = run % 2 == 1
        escaped = np.empty(found.size, dtype=bool)
        escaped[0], escaped[1:] = self._is_escaped, is_odd[:-1]
        self._is_escaped = bool(is_odd[-1])
        return escaped


_MAX_BATCH_ROWS, _BATCH_BYTES = 256, 2**23


def table_rows(path: CorpusPath, fields: TextFields) -> Iterator[list[Any]]:
    """Yield the values of the text's columns in each row of a parquet or an Arrow file.

    Raises:
        DataError: pyarrow is missing, a column is missing, or the file is cut or damaged.
    """
    kind = kind_of(path).removeprefix(".")
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(f"{path}: reading {kind} needs pyarrow; pip install 'megadiff[parquet]'") from None
    try:
        batches = _parquet_batches(path, fields) if kind == "parquet" else _arrow_batches(path, fields)
        for batch in batches:
            columns = [batch.column(name) for name in fields.names]
            for row in range(batch.num_rows):
                yield [column[row].as_py() for column in columns]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the {kind} file is cut or damaged ({error}); fetch or make it again") from error


def _parquet_batches(path: CorpusPath, fields: TextFields) -> Iterator[Any]:
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    source = open_buffered(path) if isinstance(path, RemotePath) else path
    with pyarrow.parquet.ParquetFile(source) as table:
        refuse_missing(path, fields, table.schema_arrow.names)
        yield from table.iter_batches(batch_size=_rows_at_once(table.metadata), columns=list(fields.names))


def _arrow_batches(path: CorpusPath, fields: TextFields) -> Iterator[Any]:
    """Yield the batches of an Arrow stream, as `datasets` saves it, or of an Arrow file."""
    import pyarrow  # pyright: ignore[reportMissingImports]

    is_remote = isinstance(path, RemotePath)
    with pyarrow.PythonFile(open_buffered(path)) if is_remote else pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(source)
            refuse_missing(path, fields, reader.schema.names)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            reader = pyarrow.ipc.open_stream(source)
            refuse_missing(path, fields, reader.schema.names)
            yield from reader


def refuse_missing(path: CorpusPath, fields: TextFields, names: list[str]) -> None:
    """Refuse a table without the columns of the text.

    Raises:
        DataError: one is missing.
    """
    for name in fields.names:
        if name not in names:
            listed = ", ".join(names[:_MAX_SHOWN])
            raise DataError(f"{path}: no column `{name}` (columns here: {listed}); choose with {fields.option}")


def _rows_at_once(metadata: Any) -> int:
    """Return the number of parquet rows to decode together: few if rows are long."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    longest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1.0)
    return int(min(_MAX_BATCH_ROWS, max(1, _BATCH_BYTES // max(1.0, longest))))


def csv_records(
    path: CorpusPath, lines: Iterable[str], fields: TextFields, *, max_field_bytes: int
) -> Iterator[tuple[int, list[str]]]:
    """Yield the line on which each record of a CSV or TSV file ends, and the values of the text's columns.

    Args:
        path: the file, whose name decides the delimiter.
        lines: its lines with their ends; the first one holds the names of the columns.
        fields: the columns.
        max_field_bytes: largest size of a field; a larger one is most likely a quote without its end.

    Raises:
        DataError: a column is missing, a record is too short for it, or a field is too long.
    """
    csv.field_size_limit(max_field_bytes)
    reader = csv.reader(lines, delimiter="\t" if kind_of(path) == ".tsv" else ",")
    try:
        names = next(reader, [])
        refuse_missing(path, fields, names)
        places = [names.index(name) for name in fields.names]
        for record in reader:
            if record:
                yield reader.line_num, [record[place] if place < len(record) else "" for place in places]
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not a record ({error}); correct the quotes of the file") from error
