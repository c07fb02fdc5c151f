"""Detection of text that two sources share: common passages, and a source that begins with another's tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from megadiff.data.indexed_reader import IndexedReader

_PASSAGES, _PASSAGE_TOKENS = 8, 128
_MOST_SEARCHED, _LEAST_SEARCHED = 2**24, 2**14
_CHUNK = 2**20
_SPANS, _SPAN_TOKENS = 64, 2**12


def occurring_passages(valid: IndexedReader, train: IndexedReader, *, pairs: int = 1) -> tuple[int, int]:
    """Return the number of passages of a validation source that occur in a training source, and the number searched.

    Eight passages of 128 tokens, evenly spread over the validation source, are searched for in the first 2**24 tokens
    of the training source, or in fewer when many pairs of sources are compared, to keep the start of a run short.

    Args:
        valid: source of the passages.
        train: source to search.
        pairs: number of pairs of sources that are compared in total; they share the work.
    """
    needles = [_encoded(passage, train) for passage in _passages(valid)]
    limit = min(train.num_tokens, max(_MOST_SEARCHED // pairs, _LEAST_SEARCHED))
    found = [False] * len(needles)
    for text in _chunks(train, limit, overlap=_PASSAGE_TOKENS - 1):
        for place, needle in enumerate(needles):
            found[place] = found[place] or (needle is not None and _holds(text, needle, train.dtype.itemsize))
    return sum(found), len(found)


def opening_fingerprint(reader: IndexedReader, tokens: int) -> str:
    """Return a SHA-256 (hex) of the first `tokens` tokens, of which 64 even spans of 4,096 are read.

    It detects that a file has grown: a grown file begins with all its earlier tokens.
    """
    length = min(tokens, _SPAN_TOKENS)
    digest = hashlib.sha256(f"{tokens}".encode())
    for start in sorted({(tokens - length) * i // (_SPANS - 1) for i in range(_SPANS)}):
        digest.update(reader.stored_tokens.read(start, length).astype("<i8").tobytes())
    return digest.hexdigest()


def _passages(reader: IndexedReader) -> list[np.ndarray]:
    """Return passages spread evenly over a source, from its first token to its last, in its stored type."""
    length = min(_PASSAGE_TOKENS, reader.num_tokens)
    number = min(_PASSAGES, reader.num_tokens // length)
    last = reader.num_tokens - length
    return [reader.stored_tokens.read(last * i // max(number - 1, 1), length) for i in range(number)]


def _encoded(passage: np.ndarray, train: IndexedReader) -> bytes | None:
    """Return the passage as the training source would store it; None if its type cannot hold it."""
    stored = passage.astype(train.dtype)
    return stored.tobytes() if np.array_equal(stored.astype(np.int64), passage.astype(np.int64)) else None


def _chunks(reader: IndexedReader, limit: int, *, overlap: int) -> Iterator[bytes]:
    for start in range(0, limit, _CHUNK):
        yield reader.stored_tokens.read(start, min(_CHUNK + overlap, limit - start)).tobytes()


def _holds(text: bytes, needle: bytes, itemsize: int) -> bool:
    """Return whether the needle occurs, aligned to whole tokens."""
    place = text.find(needle)
    while place >= 0 and place % itemsize:
        place = text.find(needle, place + 1)
    return place >= 0
