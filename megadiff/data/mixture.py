"""A mixture of sources: shares, budgets and order of their sequences, epochs, and the position that each has reached.

In `Permutation` a balanced Feistel network permutes the smallest 4**h >= n; results outside 0 .. n - 1 are permuted
again until one falls inside ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002), at most
4 steps on average. It uses only Python integers, so the order is the same on every machine and version.

`Blend` repeats one pattern of 10,000 places. In it each source has its exact share (largest remainder), and its
places are spread out: the j-th falls at random within the j-th of its equal strata. `SizeBlend` shares in exact
proportion to whole sizes, however unequal, and stores nothing. In both, any stretch of a run holds the sources in
proportion, and sample i is found without computing the samples before it.

A mixture is valid from one sample of the run on. Within it the sequence of a sample is a pure function of the sample's
index, the seed, and each source's name and start, for any layout and any number of resumptions. When a run resumes
with other sources or weights, a new mixture begins, and every source continues at its own next sequence. Sources are
identified by their content, not by their path or position, so moved, reordered, returning or grown data are recognised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from itertools import count as count_up
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from megadiff.data.config import SourceConfig
from megadiff.errors import DataError

T = TypeVar("T")

_ROUNDS = 8
_WORD = 2**64 - 1

PATTERN_LENGTH = 10_000
"""Number of samples in a period; weights are met to within one part in this number."""


def stream_key(*parts: str | int) -> int:
    """Hash names and numbers into a 64-bit key; different parts give different keys."""
    text = "|".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little")


def mixed(value: int) -> int:
    """Mix a 64-bit word so that close values part: the finaliser of splitmix64 (Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


class Permutation:
    """A permutation of 0 .. size - 1 determined by a key; `permutation[i]` is the image of i."""

    def __init__(self, size: int, key: int) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        self._round_keys = [mixed(key ^ mixed(number)) for number in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside 0 to {self.size - 1}")
        place = self._scrambled(index)
        while place >= self.size:
            place = self._scrambled(place)
        return place

    def _scrambled(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (mixed(right ^ key) & self._half_mask)
        return (left << self._half_bits) | right


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
        self.counts = whole_shares(weights, PATTERN_LENGTH if len(weights) > 1 else 1, keys)
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


class CountBlend:
    """A blend in which each source gives an exact number of samples, spread evenly over the sum of these numbers.

    Args:
        counts: one per source, 0 or more, not all 0.
        seed: seed of the run; moves the places, not the counts.
    """

    def __init__(self, counts: Sequence[int], *, seed: int) -> None:
        self._drawn_from = [source for source, count in enumerate(counts) if count]
        self._blend = SizeBlend([counts[source] for source in self._drawn_from], seed=seed)
        self._sources = len(counts)

    @property
    def shares(self) -> list[float]:
        """Share of the samples of each source."""
        return self._over_all(self._blend.shares, 0.0)

    def place(self, sample: int) -> Place:
        """Return the source, and the index within it, of sample `sample` >= 0."""
        place = self._blend.place(sample)
        return Place(self._drawn_from[place.source], place.index)

    def drawn(self, samples: int) -> list[int]:
        """Return the number of samples that each source gives among the first `samples`."""
        return self._over_all(self._blend.drawn(samples), 0)

    def _over_all(self, values: Sequence[T], nothing: T) -> list[T]:
        found = dict(zip(self._drawn_from, values, strict=True))
        return [found.get(source, nothing) for source in range(self._sources)]


def _period_of(sample: int, length: int) -> tuple[int, int]:
    return divmod(_not_negative(sample), length)


def _not_negative(sample: int) -> int:
    if sample < 0:
        raise IndexError(f"a sample index is 0 or more, got {sample}")
    return sample


def whole_shares(weights: Sequence[float], total: int, keys: Sequence[str]) -> list[int]:
    """Return integer shares of `total` by largest remainder; ties go to the first.

    Raises:
        DataError: a weight is so small that its share is 0.
    """
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


class Source(NamedTuple):
    """A source of training data as it is on the disk now."""

    path: str
    """Prefix of its files."""
    content: str
    """SHA-256 (hex) of its content."""
    sequences: int
    """Number of sequences in an epoch."""
    opening: Callable[[int], str]
    """Function that returns a fingerprint of the given number of sequences from the start of the source."""


class Part(BaseModel):
    """A part of a grown file whose epoch was unfinished when the file grew."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    """Name of its stream."""
    first: int = Field(ge=0)
    """First sequence of the file in this part."""
    sequences: int = Field(ge=1)
    """Number of sequences in an epoch of the part."""
    start: int = Field(ge=0)
    """Number of sequences that its stream had given when the file grew."""
    is_seen: bool = False
    """Whether all its sequences had been given before its stream began, due to an earlier growth of the file."""

    @property
    def left(self) -> int:
        """Number of sequences missing from the current epoch; 0 at the end of an epoch."""
        is_untouched = self.start == 0 and not self.is_seen
        return self.sequences if is_untouched else -self.start % self.sequences


class Position(BaseModel):
    """Reading position of one source."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    """Name of its stream, which determines its permutations together with the seed; it stays with the content."""
    content: str
    """SHA-256 (hex) of its content."""
    opening: str
    """Fingerprint of its sequences, which identifies the source after its file has grown."""
    path: str
    """Prefix of its files when it was last read."""
    sequences: int = Field(ge=1)
    """Number of sequences in an epoch."""
    start: int = Field(ge=0)
    """Number of sequences that it had given when the mixture began."""
    drawn: int = Field(ge=0)
    """Number of sequences that it has given so far in the run."""
    parts: tuple[Part, ...] = ()
    """Parts that are finished first in a file that has grown; empty if it has not."""
    whole_from: int = Field(default=0, ge=0)
    """Number of its sequences after which the parts are finished, and epochs of the whole file begin."""

    @property
    def epochs(self) -> float:
        """Number of epochs of the source so far."""
        return self.drawn / self.sequences


class Mixture(BaseModel):
    """The sources of a run from `first_sample` on, and those that it has drawn from earlier."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    first_sample: int = Field(default=0, ge=0)
    """Sample of the run at which this mixture began."""
    sources: tuple[Position, ...]
    """Positions of the sources drawn from, in the order of `data.train`."""
    removed: tuple[Position, ...] = ()
    """Positions of the sources of earlier mixtures; a source that returns continues from its position."""

    def moved_to(self, drawn: Sequence[int]) -> Mixture:
        """Return the same mixture after its sources have given these total numbers of sequences."""
        sources = [position.model_copy(update={"drawn": n}) for position, n in zip(self.sources, drawn, strict=True)]
        return self.model_copy(update={"sources": tuple(sources)})

    def at_paths_of(self, sources: Sequence[Source]) -> Mixture:
        """Return the same mixture with the current paths of its contents."""
        paths = {source.content: source.path for source in sources}
        found = [p.model_copy(update={"path": paths.get(p.content, p.path)}) for p in self.sources]
        return self.model_copy(update={"sources": tuple(found)})


def next_mixture(before: Mixture | None, sources: Sequence[Source], *, first_sample: int) -> Mixture:
    """Return the mixture of `sources` that follows another one.

    A source that the run has drawn from, in this or an earlier mixture, keeps its name and continues at its next
    sequence. So does a source whose file has grown, which first completes its current epoch. A new source begins at its
    first sequence, under a name that no other source has had.

    Args:
        before: mixture with the positions reached; None at the start of a run.
        sources: sources from now on, of different contents.
        first_sample: sample of the run at which they take over.
    """
    known = {p.content: p for p in (*before.sources, *before.removed)} if before is not None else {}
    names = _unused_names({name for p in known.values() for name in (p.name, *(part.name for part in p.parts))})
    same = {source.content: known.pop(source.content) for source in sources if source.content in known}
    found = []
    for source in sources:
        if (position := same.get(source.content)) is not None:
            found.append(position.model_copy(update={"path": source.path, "start": position.drawn}))
        elif (position := _opening_of(source, known.values())) is not None:
            found.append(_grown(source, known.pop(position.content), names))
        else:
            found.append(_position(source, next(names)))
    return Mixture(first_sample=first_sample, sources=tuple(found), removed=tuple(known.values()))


class Unfinished:
    """The order in which the unfinished parts of a grown file are drawn: in proportion to what each still lacks.

    Args:
        position: position of a source with parts.
    """

    def __init__(self, position: Position) -> None:
        self._starts = [part.start for part in position.parts]
        left = [part.left for part in position.parts]
        self._places = [place for place, n in enumerate(left) if n]
        self._begins, self._ends = position.whole_from - sum(left), position.whole_from
        self._blend = SizeBlend([n for n in left if n], seed=stream_key("grown", position.name))

    def place(self, number: int) -> tuple[int, int] | None:
        """Return the part that gives a sequence of the stream, and its number there; None once all are finished."""
        if number >= self._ends:
            return None
        source, index = self._blend.place(number - self._begins)
        part = self._places[source]
        return part, self._starts[part] + index

    def reached(self, number: int) -> list[int]:
        """Return the number of sequences that each part has given before sequence `number` of the stream."""
        reached = list(self._starts)
        for part, drawn in zip(self._places, self._blend.drawn(min(number, self._ends) - self._begins), strict=True):
            reached[part] += drawn
        return reached


def _position(source: Source, name: str, *, drawn: int = 0) -> Position:
    return Position(
        name=name,
        content=source.content,
        opening=source.opening(source.sequences),
        path=source.path,
        sequences=source.sequences,
        start=drawn,
        drawn=drawn,
    )


def _opening_of(source: Source, known: Collection[Position]) -> Position | None:
    """Return the position of the longest content whose sequences the source begins with."""
    shorter = sorted((p for p in known if p.sequences <= source.sequences), key=lambda p: -p.sequences)
    return next((p for p in shorter if source.opening(p.sequences) == p.opening), None)


def _grown(source: Source, before: Position, names: Iterator[str]) -> Position:
    """Return the position of a source that begins with all sequences of another one, and continues it."""
    if source.sequences == before.sequences:  # different files with the same sequences, or less than one sequence more
        kept = {"content": source.content, "path": source.path, "start": before.drawn}
        return before.model_copy(update=kept)
    gained = Part(name=next(names), first=before.sequences, sequences=source.sequences - before.sequences, start=0)
    parts = (*_parts_reached(before), gained)
    left = sum(part.left for part in parts)
    grown = _position(source, next(names), drawn=before.drawn)
    return grown.model_copy(update={"parts": parts, "whole_from": before.drawn + left})


def _parts_reached(position: Position) -> tuple[Part, ...]:
    """Return the parts of a source with the numbers drawn from each so far."""
    if position.drawn < position.whole_from:
        reached = Unfinished(position).reached(position.drawn)
        return tuple(p.model_copy(update={"start": n}) for p, n in zip(position.parts, reached, strict=True))
    start, is_seen = position.drawn - position.whole_from, bool(position.parts)
    return (Part(name=position.name, first=0, sequences=position.sequences, start=start, is_seen=is_seen),)


def _unused_names(used: Collection[str]) -> Iterator[str]:
    return (name for number in count_up() if (name := f"train.{number}") not in used)


class Budgets(NamedTuple):
    """The budgets of a phase."""

    targets: tuple[int | None, ...]
    """Number of sequences that each source has given in the run at the end of the phase; None without a budget."""
    ends_at: int
    """Number of samples of the run at the end of the phase."""


def target_of(entries: Mapping[str, SourceConfig], sequences: int, seq_length: int) -> int | None:
    """Return the number of sequences that a source is to give by the end of a phase; None if it has no budget.

    Args:
        entries: entries of the configuration that name the source, by their keys; their budgets add up.
        sequences: number of sequences in an epoch.
        seq_length: L.

    Raises:
        DataError: an entry has a budget and another one has none, or the budget is less than a sequence.
    """
    with_budget = [entry for entry in entries.values() if entry.has_budget]
    if not with_budget:
        return None
    if len(with_budget) < len(entries):
        raise DataError(
            f"{' and '.join(entries)} hold the same text, and not all of them have a budget of epochs or tokens; list "
            "it once, with the budget it should have"
        )
    target = 0
    for entry in with_budget:
        target += round(sequences * entry.epochs if entry.epochs is not None else (entry.tokens or 0) / seq_length)
    if not target:
        raise DataError(
            f"{' and '.join(entries)}: the budget is less than half a sequence of {seq_length} tokens; raise it, or "
            "leave the source out"
        )
    return target


def sample_counts(
    budgets: Budgets,
    *,
    first_sample: int,
    starts: Sequence[int],
    weights: Sequence[float],
    keys: Sequence[str],
) -> list[int]:
    """Return the number of samples of each source from `first_sample` to the end of the phase.

    Args:
        budgets: the budgets of the phase.
        first_sample: sample at which the mixture begins.
        starts: sequences that each source has given before.
        weights: shares of the sources without a budget, in any unit; those of others are ignored.
        keys: configuration key of each source, for messages.

    Raises:
        DataError: the budgets are more than the samples, or leave samples that no source gives.
    """
    samples = budgets.ends_at - first_sample
    counts = [
        0 if target is None else max(0, target - start) for target, start in zip(budgets.targets, starts, strict=True)
    ]
    free, rest = [place for place, target in enumerate(budgets.targets) if target is None], samples - sum(counts)
    named = ", ".join(f"{keys[place]} {count:,}" for place, count in enumerate(counts) if place not in free)
    if rest < len(free):
        raise DataError(
            f"the budgets take {sum(counts):,} sequences ({named}) of the {samples:,} that come until sample "
            f"{budgets.ends_at:,}, which leaves {max(rest, 0):,} to {len(free)} other source(s); lower epochs or "
            "tokens, or train longer"
        )
    if rest and not free:
        raise DataError(
            f"the budgets take {sum(counts):,} sequences ({named}), but {samples:,} come until sample "
            f"{budgets.ends_at:,}; leave one source without epochs or tokens, which gives the others"
        )
    if free:
        shares = whole_shares([weights[place] for place in free], rest, [keys[place] for place in free])
        for place, share in zip(free, shares, strict=True):
            counts[place] = share
    return counts
