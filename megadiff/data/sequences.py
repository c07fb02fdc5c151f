"""Sequences of L tokens, shuffled again in each epoch: parts of a source's text, or its conversations.

A sequence is a pure function of (seed, source name, sequence number): no generator, no state, no index files. How a
source is divided into sequences is in `division`. B sequences, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megadiff.data.division import Division, Padding, division_of, joined_documents, joined_masks
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.mixture import (
    Blend,
    CountBlend,
    Permutation,
    Place,
    Position,
    SizeBlend,
    SourceOrder,
    Unfinished,
    stream_key,
)


class Origin(NamedTuple):
    """Position of a sequence's first token in the data."""

    prefix: str
    """Prefix of the source's files."""
    token: int
    """Index of the token in the source's stream."""
    document: int
    within: int
    """Index of the token within that document."""


class PackedSequences:
    """An endless stream of sequences of one source: epoch after epoch, each a new permutation of the same sequences.

    Args:
        reader: the source.
        seq_length: L.
        seed, name: determine the permutations; sources of one run need different names.
        first, sequences: the part of the source that is drawn from, in sequences; by default all of it.
        division: division of the source into sequences, if it is known already.

    Raises:
        DataError: the source holds less than one sequence.
    """

    def __init__(
        self,
        reader: IndexedReader,
        seq_length: int,
        *,
        seed: int,
        name: str,
        first: int = 0,
        sequences: int = 0,
        division: Division | None = None,
    ) -> None:
        self.name = name
        self.seq_length = seq_length
        self._division = division or division_of(reader, seq_length)
        self.len_epoch = sequences or len(self._division) - first
        self.reader = reader
        self._first = first
        self._seed = seed
        self._permutation = lru_cache(maxsize=2)(self._permutation_of)

    def sequence(self, number: int) -> np.ndarray:
        """Return sequence `number` >= 0 of the stream: [L] int64."""
        return self._division.tokens(self._place(number))

    def predicted(self, number: int) -> np.ndarray | None:
        """Return which tokens of sequence `number` are to be predicted, [L] bool; None for all."""
        return self._division.predicted(self._place(number))

    def documents(self, number: int) -> np.ndarray | None:
        """Return the documents of the tokens of sequence `number`, [L] int64 (`Division.documents`); None for one."""
        return self._division.documents(self._place(number))

    def held(self, number: int) -> list[tuple[int, int]] | None:
        """Return where each document of sequence `number` begins, and which it is (`Division.held`); None for one."""
        return self._division.held(self._place(number))

    def origin(self, number: int) -> Origin:
        """Return the position of the first token of sequence `number`."""
        token = self._division.first_token(self._place(number))
        return Origin(self.reader.prefix, token, *self.reader.locate(token))

    def unseen(self, number: int) -> int:
        """Return the number of sequences that do not occur among the first `number` of the stream."""
        return max(0, self.len_epoch - number)

    def _place(self, number: int) -> int:
        epoch, within = divmod(number, self.len_epoch)
        return self._first + self._permutation(epoch)[within]

    def _permutation_of(self, epoch: int) -> Permutation:
        # "rows" is the stream's name: another name would give another order of the same data.
        return Permutation(self.len_epoch, stream_key(self._seed, "rows", self.name, epoch))


class GrownSequences:
    """The stream of a source whose file has grown: the rest of its current epoch, then epochs of the whole file.

    The sequences not yet drawn in the current epoch, and all that the file has gained, come first, in proportion. So no
    sequence repeats before every other one has come.

    Args:
        reader: the source.
        seq_length: L.
        seed: seed of the run.
        position: position of the source, with the parts of its file.
        division: division of the source into sequences, if it is known already.
    """

    def __init__(
        self,
        reader: IndexedReader,
        seq_length: int,
        *,
        seed: int,
        position: Position,
        division: Division | None = None,
    ) -> None:
        division = division or division_of(reader, seq_length)
        self.name, self.seq_length, self.len_epoch = position.name, seq_length, position.sequences
        self._unfinished, self._whole_from = Unfinished(position), position.whole_from
        self._whole = PackedSequences(reader, seq_length, seed=seed, name=position.name, division=division)
        self._parts = [
            PackedSequences(
                reader,
                seq_length,
                seed=seed,
                name=part.name,
                first=part.first,
                sequences=part.sequences,
                division=division,
            )
            for part in position.parts
        ]
        self._are_seen = [part.is_seen for part in position.parts]

    def sequence(self, number: int) -> np.ndarray:
        """Return sequence `number` of the stream: [L] int64."""
        sequences, index = self._found(number)
        return sequences.sequence(index)

    def predicted(self, number: int) -> np.ndarray | None:
        """Return which tokens of sequence `number` are to be predicted, [L] bool; None for all."""
        sequences, index = self._found(number)
        return sequences.predicted(index)

    def documents(self, number: int) -> np.ndarray | None:
        """Return the documents of the tokens of sequence `number`, [L] int64 (`Division.documents`); None for one."""
        sequences, index = self._found(number)
        return sequences.documents(index)

    def held(self, number: int) -> list[tuple[int, int]] | None:
        """Return where each document of sequence `number` begins, and which it is (`Division.held`); None for one."""
        sequences, index = self._found(number)
        return sequences.held(index)

    def origin(self, number: int) -> Origin:
        """Return the position of the first token of sequence `number`."""
        sequences, index = self._found(number)
        return sequences.origin(index)

    def unseen(self, number: int) -> int:
        """Return the number of sequences that do not occur among the first `number` of the stream."""
        reached = self._unfinished.reached(number)
        parts = zip(self._parts, self._are_seen, reached, strict=True)
        return sum(part.unseen(drawn) for part, is_seen, drawn in parts if not is_seen)

    def _found(self, number: int) -> tuple[PackedSequences, int]:
        place = self._unfinished.place(number)
        return (self._whole, number - self._whole_from) if place is None else (self._parts[place[0]], place[1])


class TrainingSequences:
    """The sequences of a run by global sample index: a blend of sources, each from its own position on.

    Args:
        sources: K sources of different names.
        weights: one per source, in any unit; None shares in exact proportion to the sequences of an epoch.
        seed: seed of the run.
        first_sample: sample at which this mixture begins; samples before it belong to another mixture.
        starts: sequences that each source had given before that sample; 0 each by default.
        copies: number of times that each source counts when sharing by size; once each by default.
        keys: configuration key of each source, for messages.
        counts: number of samples that each source gives in this mixture, in the place of weights.

    Raises:
        DataError: a weight is too small for its source to be drawn.
    """

    def __init__(
        self,
        sources: Sequence[PackedSequences | GrownSequences],
        weights: Sequence[float] | None,
        *,
        seed: int,
        first_sample: int = 0,
        starts: Sequence[int] = (),
        copies: Sequence[int] = (),
        keys: Sequence[str] = (),
        counts: Sequence[int] | None = None,
    ) -> None:
        if not sources or len({source.name for source in sources}) != len(sources):
            raise ValueError("a blend needs sources of different names")
        self.sources = list(sources)
        self.seq_length = sources[0].seq_length
        self.first_sample = first_sample
        self.starts = list(starts or [0] * len(sources))
        copies = copies or [1] * len(sources)
        if {len(sources)} != {len(self.starts), len(copies), len(sources if weights is None else weights)}:
            raise ValueError("a blend needs one weight and one start for each source")
        sizes = [number * source.len_epoch for number, source in zip(copies, sources, strict=True)]
        self.blend: SourceOrder
        if counts is not None:
            self.blend = CountBlend(counts, seed=seed)
        else:
            self.blend = SizeBlend(sizes, seed=seed) if weights is None else Blend(weights, seed=seed, keys=keys)

    def place(self, sample: int) -> Place:
        """Return the source of a sample, and the number of its sequence in that source's stream.

        Raises:
            IndexError: the sample lies before this mixture.
        """
        source, index = self.blend.place(self._in_mixture(sample))
        return Place(source, self.starts[source] + index)

    def sequences(self, samples: Sequence[int]) -> np.ndarray:
        """Return the sequences of these samples, in their order: [B, L] int64."""
        places = [self.place(sample) for sample in samples]
        return np.stack([self.sources[place.source].sequence(place.index) for place in places])

    def predicted(self, samples: Sequence[int]) -> np.ndarray | None:
        """Return which tokens of these samples' sequences are to be predicted, [B, L] bool; None for all."""
        places = [self.place(sample) for sample in samples]
        return joined_masks([self.sources[place.source].predicted(place.index) for place in places], self.seq_length)

    def documents(self, samples: Sequence[int]) -> np.ndarray | None:
        """Return the documents of these samples' tokens, [B, L] int64; None if every sequence is one document."""
        places = [self.place(sample) for sample in samples]
        return joined_documents([self.sources[one.source].documents(one.index) for one in places], self.seq_length)

    def held(self, sample: int) -> list[tuple[int, int]] | None:
        """Return where each document of a sample's sequence begins, and which it is; None for a single document."""
        place = self.place(sample)
        return self.sources[place.source].held(place.index)

    def origin(self, sample: int) -> Origin:
        """Return the position of the first token of a sample's sequence."""
        place = self.place(sample)
        return self.sources[place.source].origin(place.index)

    def drawn_before(self, sample: int) -> list[int]:
        """Return the number of sequences that each source gives before a sample, in earlier mixtures too."""
        drawn = self.blend.drawn(self._in_mixture(sample))
        return [start + count for start, count in zip(self.starts, drawn, strict=True)]

    def epochs_at(self, samples_seen: int) -> list[float]:
        """Return the number of epochs of each source after this number of samples of the run."""
        drawn = self.drawn_before(samples_seen)
        return [count / source.len_epoch for count, source in zip(drawn, self.sources, strict=True)]

    def _in_mixture(self, sample: int) -> int:
        if sample < self.first_sample:
            raise IndexError(f"sample {sample} lies before sample {self.first_sample}, where this mixture begins")
        return sample - self.first_sample


class ValidationSequences:
    """A fixed set of sequences of one source in file order, spread evenly over the file.

    Args:
        num_sequences: number of sequences requested; if the source has fewer, all of them are used.
        padding: what fills conversations up.

    Raises:
        DataError: the source holds less than one sequence.
    """

    def __init__(
        self,
        reader: IndexedReader,
        seq_length: int,
        *,
        num_sequences: int,
        name: str,
        padding: Padding | None = None,
    ) -> None:
        self.name = name
        self.seq_length = seq_length
        self.bytes_per_token = None if reader.has_spans else reader.bytes_per_token
        self.num_tokens = reader.num_tokens
        self.reader = reader
        self._division = division_of(reader, seq_length, padding)
        self.available = len(self._division)
        self._num_sequences = min(num_sequences, self.available)

    def __len__(self) -> int:
        return self._num_sequences

    def sequences(self, indices: Sequence[int]) -> np.ndarray:
        """Return the sequences of these indices, each in 0 .. len - 1: [B, L] int64."""
        return np.stack([self._division.tokens(place) for place in self._places(indices)])

    def predicted(self, indices: Sequence[int]) -> np.ndarray | None:
        """Return which tokens of these sequences are to be predicted, [B, L] bool; None for all."""
        return joined_masks([self._division.predicted(place) for place in self._places(indices)], self.seq_length)

    def documents(self, indices: Sequence[int]) -> np.ndarray | None:
        """Return the documents of these sequences' tokens, [B, L] int64; None if every sequence is one document."""
        return joined_documents([self._division.documents(place) for place in self._places(indices)], self.seq_length)

    def _places(self, indices: Sequence[int]) -> list[int]:
        if any(not 0 <= index < self._num_sequences for index in indices):
            raise IndexError(f"indices must lie in 0 to {self._num_sequences - 1}, got {list(indices)}")
        return [index * self.available // self._num_sequences for index in indices]
