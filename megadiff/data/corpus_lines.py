"""Split corpus files into lines, in linear time and with memory bounded by the part of a line that is kept.

A long JSON line is reduced to its top level: the contents of arrays and objects beside the text are dropped while
they are read, since a corpus may carry many megabytes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

LONG_LINE_BYTES = 2**20
"""JSON lines above this size are reduced to their top level while they are read."""

CHUNK_BYTES = 2**20
"""Size of the pieces in which bytes are passed on."""

_BLOCK_BYTES = 2**17  # bytes of a long line that are processed together, with four bytes of arrays for each
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_STRUCTURE = np.zeros(256, dtype=np.int8)
_STRUCTURE[list(b"[{")] = 1
_STRUCTURE[list(b"]}")] = -1


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
