"""Reading of `metrics.jsonl`, whose lines may be cut short by a kill, damaged, or written by another program."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from megadiff.errors import StorageError
from megadiff.files import MAX_DEPTH, UnreadableFileError, is_deeper, lines, why

Line = dict[str, Any]

MAX_LINE_BYTES = 2**20
"""Longest line that is read; a training step writes some hundred bytes."""

_MAX_STEP = 10**15


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines that are objects with a step, in the order of the file.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UnreadableFileError: it is no plain file.
        OSError: it cannot be read.
    """
    for raw in lines(path, max_bytes=MAX_LINE_BYTES):
        line = parsed(raw)
        if line is not None:
            yield line


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `metrics.jsonl` in order, without torn or damaged ones; none where there is no file.

    Raises:
        StorageError: it cannot be read, or is no plain file.
    """
    try:
        return list(read_lines(path))
    except FileNotFoundError:
        return []
    except (OSError, UnreadableFileError) as error:
        raise StorageError(f"{path} {why(error)}") from None


def parsed(raw: bytes | None) -> Line | None:
    """Return a line as an object with a step; None for anything else, such as a line too long to be one."""
    try:
        line = None if raw is None else orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    if raw is None or not (isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] <= _MAX_STEP):
        return None
    may_be_deep = raw.count(b"[") + raw.count(b"{") > MAX_DEPTH
    return None if may_be_deep and is_deeper(line, MAX_DEPTH) else line


def number(line: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number of a line; None for what is missing, null or something else."""
    return finite(line.get(key))


def finite(value: Any) -> float | None:
    """Return the value as a float if it is a finite number, else None."""
    if type(value) is not float:  # nearly all are: the rest is looked at more slowly
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        value = float(value)
    return value if math.isfinite(value) else None
