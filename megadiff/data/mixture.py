"""Reading positions of a run's sources, saved in every checkpoint, so that the mixture can change within a run.

A mixture is valid from one sample of the run on. Within it the sequence of a sample is a pure function of the sample's
index, the seed, and each source's name and start, for any layout and any number of resumptions. When a run resumes
with other sources or weights, a new mixture begins, and every source continues at its own next sequence. Sources are
identified by their content, not by their path or position, so moved, reordered, returning or grown data are recognised.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import count
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from megadiff.data.blend import SizeBlend
from megadiff.data.permutation import stream_key


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


def first_mixture(sources: Sequence[Source]) -> Mixture:
    """Return the mixture of a new run: every source at its first sequence, named by its position."""
    return next_mixture(None, sources, first_sample=0)


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
    return (name for number in count() if (name := f"train.{number}") not in used)
