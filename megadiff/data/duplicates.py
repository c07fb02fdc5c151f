"""Documents that repeat an earlier one of the corpus, found on disk before anything is tokenized.

The digests of every unit (a shard's part of the corpus, or all of it) are written to one file, sorted in runs of a
fixed number of documents. Each of several groups of digests is then compared over all units; a group is the digests
that begin with the same bits, and there are enough groups for one to fit in memory. What is found does not depend on
the order in which units or groups are done: the first document of the corpus with a text is kept, and all later ones
are left out. Memory holds one run or one group, and a bit for each document of a unit.
"""

from __future__ import annotations

import bisect
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megadiff.data.documents import DIGEST_BYTES, Corpus, digest
from megadiff.data.indexed_format import StoredFile
from megadiff.errors import DataError
from megadiff.files import write_atomically

_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<u4")])
_REPEAT = np.dtype([("unit", "<u4"), ("document", "<u4")])
_RUN_DOCUMENTS = 2**20
_GROUP_DOCUMENTS = 2**21
_MOST_GROUPS = 4096
_MOST_DOCUMENTS = 2**32
_SHOW_EVERY = 2**12


class Numbers:
    """A set of document numbers: one bit for each document up to the largest of them.

    Args:
        parts: numbers, in arrays of any order.
    """

    def __init__(self, parts: Iterable[np.ndarray]) -> None:
        bits = np.zeros(0, dtype=np.uint8)
        for numbers in parts:
            if numbers.size:
                missing = int(numbers.max() >> 3) + 1 - bits.size
                bits = np.concatenate([bits, np.zeros(max(0, missing), dtype=np.uint8)])
                np.bitwise_or.at(bits, numbers >> 3, (1 << (numbers & 7)).astype(np.uint8))
        self._bits = bits.tobytes()

    def __contains__(self, number: object) -> bool:
        assert isinstance(number, int)
        place = number >> 3
        return place < len(self._bits) and bool(self._bits[place] >> (number & 7) & 1)


def find_repeats(corpus: Corpus, folder: Path, show: Callable[[], None]) -> Numbers:
    """Return the numbers of the documents of a whole corpus that repeat an earlier one; read it once.

    Args:
        corpus: the corpus; its report is that of the pass.
        folder: a folder for files, which is made, and removed in the end.
        show: function that is called now and then.

    Raises:
        DataError: a document is bad beyond the corpus's limit, or the disk is full.
    """
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
    try:
        folder.mkdir(parents=True)
        digests = [folder / "digests"]
        write_digests(corpus, digests[0], show)
        groups = num_groups(digests)
        repeats = [folder / f"{group:04d}" for group in range(groups)]
        for group, path in enumerate(repeats):
            write_repeats(digests, path, group=group, groups=groups)
            show()
        return repeats_of(0, repeats)
    except OSError as error:
        raise DataError(f"{folder}: writing failed ({error.strerror}); free disk space and run again") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def num_groups(digests: Sequence[Path]) -> int:
    """Return the number of groups for the files of `write_digests`, such that a group takes 200 MB at most.

    Raises:
        OSError: a file is missing.
    """
    documents = sum(path.stat().st_size for path in digests) // _ENTRY.itemsize
    return min(_MOST_GROUPS, 1 + documents // _GROUP_DOCUMENTS)


def write_digests(corpus: Corpus, path: Path, show: Callable[[], None] | None = None) -> None:
    """Write the digests of the documents of a unit that pass its filters, with their numbers.

    Args:
        corpus: the unit.
        path: the file to write.
        show: function that is called now and then.

    Raises:
        DataError: a document is bad beyond the corpus's limit, or there are more than an entry can number.
        OSError: the disk refuses.
    """
    write_atomically(path, _sorted_runs(corpus, show))


def _sorted_runs(corpus: Corpus, show: Callable[[], None] | None) -> Iterator[bytes]:
    held, first = bytearray(), 0
    for number, text in enumerate(corpus.documents()):
        if number >= _MOST_DOCUMENTS:
            raise DataError(f"--drop-duplicates: wanted at most {number} documents, found more; use --shards")
        held += digest(text)
        if show is not None and number % _SHOW_EVERY == 0:
            show()
        if len(held) == _RUN_DOCUMENTS * DIGEST_BYTES:
            yield _sorted_run(held, first)
            held, first = bytearray(), number + 1
    yield _sorted_run(held, first)


def _sorted_run(digests: bytearray, first: int) -> bytes:
    """Return the entries of digests of documents that are numbered from `first` on, in ascending order."""
    halves = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable, so that equal digests keep the order of the documents
    entries = np.empty(len(halves), dtype=_ENTRY)
    entries["high"], entries["low"] = halves[order, 0], halves[order, 1]
    entries["document"] = first + order
    return entries.tobytes()


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
    parts = [_Sorted(file, _ENTRY, "high", run=_RUN_DOCUMENTS).between(least, end) for file in digests]
    entries = np.concatenate(parts)
    unit = np.repeat(np.arange(len(parts), dtype="<u4"), [len(part) for part in parts])
    del parts
    order = np.lexsort((entries["document"], unit, entries["low"], entries["high"]))
    high, low = entries["high"][order], entries["low"][order]
    is_repeat = np.zeros(len(order), dtype=bool)
    is_repeat[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    found = order[is_repeat]
    repeats = np.empty(len(found), dtype=_REPEAT)
    repeats["unit"], repeats["document"] = unit[found], entries["document"][found]
    write_atomically(path, np.sort(repeats, order=("unit", "document")).tobytes())


def repeats_of(unit: int, files: Sequence[Path]) -> Numbers:
    """Return the numbers of the documents of a unit that repeat an earlier one.

    Args:
        unit: number of the unit.
        files: files of `write_repeats`, of all groups.

    Raises:
        DataError: a file is missing or damaged.
    """
    return Numbers(_Sorted(path, _REPEAT, "unit").between(unit, unit + 1)["document"] for path in files)


class _Sorted:
    """A file of entries that ascend in one of their fields, in the whole file or in each run of a fixed number."""

    def __init__(self, path: Path, dtype: np.dtype, field: str, *, run: int | None = None) -> None:
        self._file, self._dtype, self._field = StoredFile(path), dtype, field
        self._count, left = divmod(self._file.size, dtype.itemsize)
        if left:
            raise DataError(f"{path}: cut short or damaged; remove the file and repeat the command")
        self._run = run or max(1, self._count)

    def between(self, least: int, end: int) -> np.ndarray:
        """Return the entries whose field is at least `least` and below `end`, run after run."""
        parts = [np.empty(0, dtype=self._dtype)]
        for start in range(0, self._count, self._run):
            places = range(start, min(start + self._run, self._count))
            first, last = (start + bisect.bisect_left(places, value, key=self._value) for value in (least, end))
            parts.append(self._read(first, last - first))
        return np.concatenate(parts)

    def _value(self, place: int) -> int:
        return int(self._read(place, 1)[self._field][0])

    def _read(self, place: int, count: int) -> np.ndarray:
        size = self._dtype.itemsize
        return np.frombuffer(self._file.read(place * size, count * size), dtype=self._dtype)
