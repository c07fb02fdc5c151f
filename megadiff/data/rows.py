"""Rows of L tokens: a source's documents joined end to end, cut, and shuffled anew in each epoch.

A row is a pure function of (seed, source name, row number): no generator, no state, no index files. What is left at a
source's end, less than one row, is never seen. B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megadiff.data.blend import Blend
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.permutation import Permutation, stream_key
from megadiff.errors import DataError


class Origin(NamedTuple):
    """Where a row's first token stands in the data."""

    prefix: str
    """Of the source's files."""
    token: int
    """Its place in the source's stream of tokens."""
    document: int
    within: int
    """Its place in that document."""


class PackedRows:
    """An endless stream of rows of one source: epoch after epoch, each a new permutation of the same rows.

    Args:
        reader: the source.
        seq_length: L.
        seed, name: fix the permutations; sources of one run need different names.

    Raises:
        DataError: the source holds less than one row.
    """

    def __init__(self, reader: IndexedReader, seq_length: int, *, seed: int, name: str) -> None:
        self.name = name
        self.seq_length = seq_length
        self.len_epoch = _rows_in(reader, seq_length)
        self.reader = reader
        self._seed = seed
        self._permutation = lru_cache(maxsize=2)(self._permutation_of)

    def row(self, number: int) -> np.ndarray:
        """Row `number` >= 0 of the stream: [L] int64."""
        return self.reader.tokens(self._first_token(number), self.seq_length)

    def origin(self, number: int) -> Origin:
        """Where row `number` begins."""
        token = self._first_token(number)
        return Origin(self.reader.prefix, token, *self.reader.locate(token))

    def _first_token(self, number: int) -> int:
        epoch, within = divmod(number, self.len_epoch)
        return self._permutation(epoch)[within] * self.seq_length

    def _permutation_of(self, epoch: int) -> Permutation:
        return Permutation(self.len_epoch, stream_key(self._seed, "rows", self.name, epoch))


class TrainingRows:
    """The rows of a run by global sample index: a weighted blend of sources.

    Raises:
        DataError: a weight is too small for its source to be seen.
    """

    def __init__(self, sources: Sequence[PackedRows], weights: Sequence[float], *, seed: int) -> None:
        if not sources or len(sources) != len(weights) or len({source.name for source in sources}) != len(sources):
            raise ValueError("a blend needs sources of different names and one weight for each")
        self.sources = list(sources)
        self.seq_length = sources[0].seq_length
        self.blend = Blend(weights, seed=seed)

    def rows(self, samples: Sequence[int]) -> np.ndarray:
        """The rows of these samples, in their order: [B, L] int64."""
        places = [self.blend.place(sample) for sample in samples]
        return np.stack([self.sources[place.source].row(place.index) for place in places])

    def origin(self, sample: int) -> Origin:
        """Where the row of a sample begins."""
        place = self.blend.place(sample)
        return self.sources[place.source].origin(place.index)

    def epochs_at(self, samples_seen: int) -> list[float]:
        """How often each source has been gone through after that many samples."""
        shares = np.array(self.blend.counts) / sum(self.blend.counts)
        return [float(share * samples_seen / s.len_epoch) for share, s in zip(shares, self.sources, strict=True)]


class ValidationRows:
    """A fixed set of rows of one source in file order, spread evenly over the file.

    Args:
        num_rows: rows wanted; where the source has fewer, all of them.

    Raises:
        DataError: the source holds less than one row.
    """

    def __init__(self, reader: IndexedReader, seq_length: int, *, num_rows: int, name: str) -> None:
        self.name = name
        self.seq_length = seq_length
        self.bytes_per_token = reader.bytes_per_token
        self.reader = reader
        self._available = _rows_in(reader, seq_length)
        self._num_rows = min(num_rows, self._available)

    def __len__(self) -> int:
        return self._num_rows

    def rows(self, indices: Sequence[int]) -> np.ndarray:
        """The rows of these indices, each in 0 .. len - 1: [B, L] int64."""
        if any(not 0 <= index < self._num_rows for index in indices):
            raise IndexError(f"indices must lie in 0 to {self._num_rows - 1}, got {list(indices)}")
        places = [index * self._available // self._num_rows for index in indices]
        return np.stack([self.reader.tokens(place * self.seq_length, self.seq_length) for place in places])


def _rows_in(reader: IndexedReader, seq_length: int) -> int:
    if seq_length < 1:
        raise ValueError(f"seq_length must be at least 1, got {seq_length}")
    if reader.num_tokens < seq_length:
        raise DataError(
            f"{reader.prefix}: wanted at least one row of {seq_length} tokens, found {reader.num_tokens} in all; "
            "give more text or lower model.seq_length"
        )
    return reader.num_tokens // seq_length
