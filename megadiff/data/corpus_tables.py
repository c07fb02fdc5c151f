"""Rows of parquet and Arrow files, and records of CSV files, as values of the columns that hold the text."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from typing import Any

from megadiff.data.corpus_files import TextFields
from megadiff.data.corpus_streams import kind_of, open_buffered
from megadiff.data.remote_files import CorpusPath, RemotePath
from megadiff.errors import DataError

_MAX_BATCH_ROWS, _BATCH_BYTES = 256, 2**23
_MAX_SHOWN = 8


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
