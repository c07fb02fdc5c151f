"""Documents that repeat an earlier one of the corpus, found on disk before anything is tokenized.

Every unit's digests are written to one file, sorted. Each of several groups of digests is then compared over all units;
a group is the digests that begin with the same bits, and there are enough groups for one to fit in memory. What is
found does not depend on the order in which units or groups are done: the first document of the corpus with a text is
kept, and all later ones are left out.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megadiff.data.document_filters import digest
from megadiff.data.documents import Corpus
from megadiff.data.indexed_format import StoredFile
from megadiff.errors import DataError
from megadiff.files import write_atomically

_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<u4")])
_REPEAT = np.dtype([("unit", "<u4"), ("document", "<u4")])
_GROUP_BYTES = 2**32
_MOST_GROUPS = 4096


def num_groups(input_bytes: int) -> int:
    """Return the number of groups for an input of this size, such that a group takes a few hundred MB at most."""
    return min(_MOST_GROUPS, 1 + input_bytes // _GROUP_BYTES)


def write_digests(corpus: Corpus, path: Path) -> None:
    """Write the digests of the documents of a unit that pass its filters, with their numbers, in ascending order.

    Raises:
        DataError: a document is bad beyond the corpus's limit.
        OSError: the disk refuses.
    """
    digests = b"".join(digest(text) for text in corpus.documents())
    halves = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
    entries = np.empty(len(halves), dtype=_ENTRY)
    entries["high"], entries["low"] = halves[:, 0], halves[:, 1]
    entries["document"] = np.arange(len(halves))
    write_atomically(path, np.sort(entries, order=("high", "low", "document")).tobytes())


def write_repeats(digests: Sequence[Path], path: Path, *, group: int, groups: int) -> None:
    """Write which documents of one group of digests repeat an earlier document.

    Args:
        digests: files of `write_digests`, of all units in order.
        path: the file to write.
        group: number of the group.
        groups: number of groups.

    Raises:
        DataError: a file is missing or damaged.
        OSError: the disk refuses.
    """
    least, end = (number * 2**64 // groups for number in (group, group + 1))
    parts = [_Sorted(file, _ENTRY, "high").between(least, end) for file in digests]
    entries = np.concatenate(parts)
    unit = np.repeat(np.arange(len(parts), dtype="<u4"), [len(part) for part in parts])
    order = np.lexsort((entries["document"], unit, entries["low"], entries["high"]))
    high, low = entries["high"][order], entries["low"][order]
    is_repeat = np.zeros(len(order), dtype=bool)
    is_repeat[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    found = order[is_repeat]
    repeats = np.empty(len(found), dtype=_REPEAT)
    repeats["unit"], repeats["document"] = unit[found], entries["document"][found]
    write_atomically(path, np.sort(repeats, order=("unit", "document")).tobytes())


def repeats_of(unit: int, files: Sequence[Path]) -> frozenset[int]:
    """Return the numbers of the documents of a unit that repeat an earlier one.

    Args:
        unit: number of the unit.
        files: files of `write_repeats`, of all groups.

    Raises:
        DataError: a file is missing or damaged.
    """
    found: set[int] = set()
    for path in files:
        repeats = _Sorted(path, _REPEAT, "unit").between(unit, unit + 1)
        found.update(repeats["document"].tolist())
    return frozenset(found)


class _Sorted:
    """A file of entries that ascend in one of their fields."""

    def __init__(self, path: Path, dtype: np.dtype, field: str) -> None:
        self._file, self._dtype, self._field = StoredFile(path), dtype, field
        self._count, left = divmod(self._file.size, dtype.itemsize)
        if left:
            raise DataError(f"{path}: cut short or damaged; remove the file and repeat the command")

    def between(self, least: int, end: int) -> np.ndarray:
        """Return the entries whose field is at least `least` and below `end`."""
        first, last = (bisect.bisect_left(range(self._count), value, key=self._value) for value in (least, end))
        return self._read(first, last - first)

    def _value(self, place: int) -> int:
        return int(self._read(place, 1)[self._field][0])

    def _read(self, place: int, count: int) -> np.ndarray:
        size = self._dtype.itemsize
        return np.frombuffer(self._file.read(place * size, count * size), dtype=self._dtype)
