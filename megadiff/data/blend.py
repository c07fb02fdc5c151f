"""A weighted blend of sources as a pure function of the sample index: no state, no index files.

One pattern of 10,000 places is repeated. In it each source has its exact share (largest remainder), and the places of
a source are spread: its j-th falls at random within the j-th of its equal strata. Any stretch of a run so holds each
source in proportion, and sample i is found in constant time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megadiff.data.permutation import mixed, stream_key
from megadiff.errors import DataError

PATTERN_LENGTH = 10_000
"""Samples in a period; weights are met to within one part in this many."""


class Place(NamedTuple):
    """Where a sample comes from."""

    source: int
    index: int
    """Number of samples that the same source has given before: 0, 1, 2, ..."""


class Blend:
    """Maps sample index i >= 0 to a source and an index within it.

    Args:
        weights: one per source, positive, in any unit.
        seed: of the run; moves the places of a pattern, not its shares.

    Raises:
        DataError: a weight is so small that its source would never be seen.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        self.counts = _shares(weights, PATTERN_LENGTH if len(weights) > 1 else 1)
        self._pattern = _spread(self.counts, seed)
        self._rank = np.empty_like(self._pattern)  # of a place among those of its source
        for source in range(len(weights)):
            mine = self._pattern == source
            self._rank[mine] = np.arange(mine.sum())

    def place(self, sample: int) -> Place:
        """Source, and index within it, of sample `sample` >= 0."""
        if sample < 0:
            raise IndexError(f"a sample index is 0 or more, got {sample}")
        period, within = divmod(sample, len(self._pattern))
        source = int(self._pattern[within])
        return Place(source, period * self.counts[source] + int(self._rank[within]))


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole shares of `total` by largest remainder; of equal remainders the first wins."""
    weight_sum = float(sum(weights))
    exact = [weight / weight_sum * total for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda source: (counts[source] - exact[source], source))
    for source in by_remainder[: total - sum(counts)]:
        counts[source] += 1
    if 0 in counts:
        source = counts.index(0)
        least = f"at least {weight_sum / total:.3g} of {weight_sum:.3g} in all"
        raise DataError(
            f"data.train[{source}].weight: wanted {least}, found {weights[source]}; raise it or drop the source"
        )
    return counts


def _spread(counts: Sequence[int], seed: int) -> np.ndarray:
    """[sum(counts)] source numbers in order of (j + a random part of 1) / count for the j-th of each source."""
    times: list[tuple[float, int]] = []
    for source, count in enumerate(counts):
        key = stream_key(seed, "blend", source)
        times.extend(((j + mixed(key + j) / 2**64) / count, source) for j in range(count))
    return np.array([source for _, source in sorted(times)], dtype=np.int64)
