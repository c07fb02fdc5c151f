"""Blends of sources as pure functions of the sample index: no state, no index files.

`Blend` repeats one pattern of 10,000 places. In it each source has its exact share (largest remainder), and its
places are spread out: the j-th falls at random within the j-th of its equal strata. `SizeBlend` shares in exact
proportion to whole sizes, however unequal, and stores nothing. In both, any stretch of a run holds the sources in
proportion, and sample i is found without computing the samples before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import numpy as np

from megadiff.data.permutation import mixed, stream_key
from megadiff.errors import DataError

PATTERN_LENGTH = 10_000
"""Number of samples in a period; weights are met to within one part in this number."""


class Place(NamedTuple):
    """The origin of a sample."""

    source: int
    index: int
    """Number of samples that the same source has given before: 0, 1, 2, ..."""


class SourceOrder(Protocol):
    """The common interface of both blends: a map from sample index i >= 0 to a source and an index within it."""

    @property
    def shares(self) -> list[float]:
        """Share of the samples of each source; the shares sum to 1."""
        ...

    def place(self, sample: int) -> Place:
        """Return the source, and the index within it, of sample `sample` >= 0."""
        ...

    def drawn(self, samples: int) -> list[int]:
        """Return the number of samples that each source gives among the first `samples`."""
        ...


class Blend:
    """A blend by weights, as a repeated pattern.

    Args:
        weights: one per source, positive, in any unit.
        seed: seed of the run; moves the places of a pattern, not its shares.
        keys: configuration key of each source, for messages; by default `data.train[0]`, `data.train[1]`, ...

    Raises:
        DataError: a weight is so small that its source would never be drawn.
    """

    def __init__(self, weights: Sequence[float], *, seed: int, keys: Sequence[str] = ()) -> None:
        keys = keys or [f"data.train[{source}]" for source in range(len(weights))]
        self.counts = _shares(weights, PATTERN_LENGTH if len(weights) > 1 else 1, keys)
        self._pattern = _spread(self.counts, seed)
        self._rank = np.empty_like(self._pattern)  # rank of each place among those of its source
        for source in range(len(weights)):
            mine = self._pattern == source
            self._rank[mine] = np.arange(mine.sum())

    @property
    def shares(self) -> list[float]:
        """Share of the samples of each source."""
        return [count / len(self._pattern) for count in self.counts]

    def place(self, sample: int) -> Place:
        """Return the source, and the index within it, of sample `sample` >= 0."""
        period, within = _period_of(sample, len(self._pattern))
        source = int(self._pattern[within])
        return Place(source, period * self.counts[source] + int(self._rank[within]))

    def drawn(self, samples: int) -> list[int]:
        """Return the number of samples that each source gives among the first `samples`."""
        period, within = _period_of(samples, len(self._pattern))
        begun = np.bincount(self._pattern[:within], minlength=len(self.counts)).tolist()
        return [period * count + more for count, more in zip(self.counts, begun, strict=True)]


class SizeBlend:
    """A blend in exact proportion to sizes: after sum(sizes) samples, source k has given exactly sizes[k].

    The sources are the leaves of a balanced binary tree. Of the samples that reach a node with `left` of `total` on
    its left side, that side takes one in each of `left` strata of (nearly) equal length, at a place chosen by a hash of
    the stratum's number. The side that takes a sample, and the number it took before, thus follow from the sample's
    number alone, in integer arithmetic without rounding.

    Args:
        sizes: one per source, at least 1; K in all.
        seed: seed of the run; moves the places, not the shares.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes must be at least 1, got {list(sizes)}")
        self._ends = [0, *accumulate(sizes)]
        self._keys: dict[tuple[int, int], int] = {}
        self._seed = seed

    @property
    def shares(self) -> list[float]:
        """Share of the samples of each source."""
        return [(end - start) / self._ends[-1] for start, end in pairwise(self._ends)]

    def place(self, sample: int) -> Place:
        """Return the source, and the index within it, of sample `sample` >= 0; takes log2(K) steps."""
        low, high, index = 0, len(self._ends) - 1, _not_negative(sample)
        while high - low > 1:
            middle = (low + high) // 2
            before, is_left = self._split(index, low, middle, high)
            low, high = (low, middle) if is_left else (middle, high)
            index = before if is_left else index - before
        return Place(low, index)

    def drawn(self, samples: int) -> list[int]:
        """Return the number of samples that each source gives among the first `samples`."""
        return self._drawn(_not_negative(samples), 0, len(self._ends) - 1)

    def _drawn(self, samples: int, low: int, high: int) -> list[int]:
        if high - low == 1:
            return [samples]
        middle = (low + high) // 2
        left, _ = self._split(samples, low, middle, high)
        return self._drawn(left, low, middle) + self._drawn(samples - left, middle, high)

    def _split(self, index: int, low: int, middle: int, high: int) -> tuple[int, bool]:
        """Return how many samples before `index` sources low .. middle - 1 take, and whether they take `index`.

        Stratum j of the left side holds the samples i with j = floor(i * left / total).
        """
        left, total = self._ends[middle] - self._ends[low], self._ends[high] - self._ends[low]
        stratum = index * left // total
        start, end = -(-stratum * total // left), -(-(stratum + 1) * total // left)
        if (low, high) not in self._keys:
            self._keys[low, high] = stream_key(self._seed, "blend by size", low, high)
        taken = start + mixed(self._keys[low, high] + stratum) % (end - start)
        return stratum + (index > taken), index == taken


def _period_of(sample: int, length: int) -> tuple[int, int]:
    return divmod(_not_negative(sample), length)


def _not_negative(sample: int) -> int:
    if sample < 0:
        raise IndexError(f"a sample index is 0 or more, got {sample}")
    return sample


def _shares(weights: Sequence[float], total: int, keys: Sequence[str]) -> list[int]:
    """Return integer shares of `total` by largest remainder; ties go to the first."""
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
            f"{keys[source]}.weight: wanted {least}, found {weights[source]:.6g}; raise it, drop the source, or leave "
            "out every weight to share by size"
        )
    return counts


def _spread(counts: Sequence[int], seed: int) -> np.ndarray:
    """Return [sum(counts)] source numbers, the j-th of each source at time (j + a random part of 1) / count."""
    times: list[tuple[float, int]] = []
    for source, count in enumerate(counts):
        key = stream_key(seed, "blend", source)
        times.extend(((j + mixed(key + j) / 2**64) / count, source) for j in range(count))
    return np.array([source for _, source in sorted(times)], dtype=np.int64)
