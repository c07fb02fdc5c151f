"""Positions of a run's sources: how far each has been read, kept in every checkpoint, so that a mixture can change.

A mixture holds from one sample of the run on. Within it the sequence of a sample is a pure function of the sample's
index, the seed, and each source's name and start, whatever the layout and however often the run is resumed. When a run
goes on with other sources or weights, a new mixture begins, and every source goes on at its own next sequence. Sources
are known by their content, not by their path or place, so that moved, reordered, returning or grown data are
recognised.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import count
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from megadiff.data.blend import SizeBlend
from megadiff.data.permutation import stream_key


class Source(NamedTuple):
    """A source of training data as it lies on the disk now."""

    path: str
    """Prefix of its files."""
    content: str
    """SHA-256 (hex) of its content."""
    sequences: int
    """Number of sequences in an epoch."""
    opening: Callable[[int], str]
    """Returns a fingerprint of as many sequences from the beginning of the source."""


class Part(BaseModel):
    """A part of a grown file, whose epoch was not finished when the file grew."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    """Name of its stream."""
    first: int = Field(ge=0)
    """First sequence of the file that belongs to it."""
    sequences: int = Field(ge=1)
    """Number of sequences in an epoch of it."""
    start: int = Field(ge=0)
    """Number of sequences its stream had given when the file grew."""
    is_seen: bool = False
    """Whether every sequence had been given before its stream began, from an earlier growth of the file."""

    @property
    def left(self) -> int:
        """Number of sequences that the epoch under way still lacks; none at the end of an epoch."""
        is_untouched = self.start == 0 and not self.is_seen
        return self.sequences if is_untouched else -self.start % self.sequences


class Position(BaseModel):
    """Reading position of one source."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    """Name of its stream, which with the seed fixes its permutations; it stays with the content."""
    content: str
    """SHA-256 (hex) of its content."""
    opening: str
    """Fingerprint of its sequences, by which it is recognised when its file grows."""
    path: str
    """Prefix of its files when it was last read."""
    sequences: int = Field(ge=1)
    """Number of sequences in an epoch."""
    start: int = Field(ge=0)
    """Number of sequences it had given when the mixture began."""
    drawn: int = Field(ge=0)
    """Number of sequences it has given so far in the run."""
    parts: tuple[Part, ...] = ()
    """Parts that come first in a file that has grown; none in one that has not."""
    whole_from: int = Field(default=0, ge=0)
    """Number of its sequences after which these are finished, and epochs of the whole file begin."""

    @property
    def epochs(self) -> float:
        """Number of times the source has been gone through."""
        return self.drawn / self.sequences


class Mixture(BaseModel):
    """The sources of a run from `first_sample` on, and those it has drawn from earlier."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    first_sample: int = Field(default=0, ge=0)
    """Sample of the run at which this mixture began."""
    sources: tuple[Position, ...]
    """Positions of the sources drawn from, in the order of `data.train`."""
    removed: tuple[Position, ...] = ()
    """Positions of sources that an earlier mixture had; one that returns goes on from there."""

    def moved_to(self, drawn: Sequence[int]) -> Mixture:
        """Return the same mixture after its sources have given this many sequences in all."""
        sources = [position.model_copy(update={"drawn": n}) for position, n in zip(self.sources, drawn, strict=True)]
        return self.model_copy(update={"sources": tuple(sources)})

    def at_paths_of(self, sources: Sequence[Source]) -> Mixture:
        """Return the same mixture with the paths at which its contents lie now."""
        paths = {source.content: source.path for source in sources}
        found = [p.model_copy(update={"path": paths.get(p.content, p.path)}) for p in self.sources]
        return self.model_copy(update={"sources": tuple(found)})


def first_mixture(sources: Sequence[Source]) -> Mixture:
    """Return the mixture of a run that begins: every source at its first sequence, named by its place."""
    return next_mixture(None, sources, first_sample=0)


def next_mixture(before: Mixture | None, sources: Sequence[Source], *, first_sample: int) -> Mixture:
    """Return the mixture of `sources` that follows another one.

    A source that the run has drawn from, now or in an earlier mixture, keeps its name and goes on at its next
    sequence; so does one whose file has grown, which first gives what its epoch still lacks. A source that is new
    begins at its first sequence under a name that no other source has had.

    Args:
        before: mixture with the positions reached; None at the beginning of a run.
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
    """The order in which the unfinished parts of a grown file are drawn: each in proportion to what it still lacks.

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
        """Return how many sequences each part has given before sequence `number` of the stream."""
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
    """Return the position of the longest content whose sequences the source opens with."""
    shorter = sorted((p for p in known if p.sequences <= source.sequences), key=lambda p: -p.sequences)
    return next((p for p in shorter if source.opening(p.sequences) == p.opening), None)


def _grown(source: Source, before: Position, names: Iterator[str]) -> Position:
    """Return the position of a source that opens with the sequences of another one, all of which it continues."""
    if source.sequences == before.sequences:  # other files, or less than a sequence more, of the same sequences
        kept = {"content": source.content, "path": source.path, "start": before.drawn}
        return before.model_copy(update=kept)
    gained = Part(name=next(names), first=before.sequences, sequences=source.sequences - before.sequences, start=0)
    parts = (*_parts_reached(before), gained)
    left = sum(part.left for part in parts)
    grown = _position(source, next(names), drawn=before.drawn)
    return grown.model_copy(update={"parts": parts, "whole_from": before.drawn + left})


def _parts_reached(position: Position) -> tuple[Part, ...]:
    """Return the parts of a source as far as they have been drawn from."""
    if position.drawn < position.whole_from:
        reached = Unfinished(position).reached(position.drawn)
        return tuple(p.model_copy(update={"start": n}) for p, n in zip(position.parts, reached, strict=True))
    start, is_seen = position.drawn - position.whole_from, bool(position.parts)
    return (Part(name=position.name, first=0, sequences=position.sequences, start=start, is_seen=is_seen),)


def _unused_names(used: Collection[str]) -> Iterator[str]:
    return (name for number in count() if (name := f"train.{number}") not in used)
