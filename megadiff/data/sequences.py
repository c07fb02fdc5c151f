"""Sequences of L tokens: a source divided into them, and their order, shuffled again in each epoch.

A sequence is a pure function of (seed, source name, sequence number): no generator, no state, no index files.
B sequences, L positions.

Text is one stream: documents are joined end to end and cut at every L tokens, and the rest at the end, less than one
sequence, is never used. Conversations are sequences of their own: each is cut at L tokens or filled up, and one whose
answers would all be cut away is left out. Several short ones can share a sequence (`PackedConversations`).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

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
from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import DataError

OPEN_SEQUENCES = 64
"""Number of packed sequences that wait for further conversations at a time."""


class Padding(NamedTuple):
    """The token that fills conversations up to a sequence."""

    token: int
    is_predicted: bool
    """Whether the model learns to predict it."""
    is_behind_several: bool = False
    """Whether conversations share a sequence, which is filled up behind the last of them (`data.packing`)."""

    def __str__(self) -> str:
        """Return what fingerprints of data hold."""
        own = f"Padding(token={self.token}, is_predicted={self.is_predicted})"
        return f"{own}, best fit among {OPEN_SEQUENCES} sequences" if self.is_behind_several else own


def padding_of(policy: str | None, tokenizer: Tokenizer, *, packing: bool = False) -> Padding | None:
    """Return what `data.padding` and `data.packing` mean with a tokenizer; None if the first is not set.

    Raises:
        DataError: the tokenizer lacks the token.
    """
    if policy is None:
        return None
    token = tokenizer.pad_id if policy == "pad" else tokenizer.eos_id
    if token is None:
        kind, other = ("pad", "eos") if policy == "pad" else ("end-of-text", "pad")
        raise DataError(
            f"data.padding is {policy}, but the tokenizer {tokenizer.name} has no {kind} token; set it to {other}, or "
            "use a tokenizer with one"
        )
    return Padding(token, policy == "predicted_eos", packing)


class Division(Protocol):
    """The sequences of a source. By default all tokens are predicted, and all attend to each other."""

    def __len__(self) -> int: ...

    def tokens(self, place: int) -> np.ndarray:
        """Return a sequence: [L] int64."""
        ...

    def predicted(self, place: int) -> np.ndarray | None:
        """Return which of its tokens are to be predicted, [L] bool; None for all."""
        del place

    def documents(self, place: int) -> np.ndarray | None:
        """Return the number, from 0, of the document of each of its tokens, [L] int64; None if all belong together.

        Tokens of one document do not attend to those of another. What fills a sequence up is a document too.
        """
        del place

    def held(self, place: int) -> list[tuple[int, int]] | None:
        """Return the place of each document's first token in the sequence, and its index in the source; None as above.

        What fills the sequence up is none of them.
        """
        del place

    def first_token(self, place: int) -> int:
        """Return the index of its first token in the source's stream."""
        ...

    def extent(self, sequences: int) -> int:
        """Return the number of tokens at the start of the stream that hold the first `sequences` sequences."""
        ...


def division_of(reader: IndexedReader, seq_length: int, padding: Padding | None = None) -> Division:
    """Return the division of a source.

    Args:
        reader: the source.
        seq_length: L.
        padding: what fills conversations up; without it, a source of conversations is refused.

    Raises:
        DataError: there is not one sequence, or no padding for conversations.
    """
    if seq_length < 1:
        raise ValueError(f"seq_length must be at least 1, got {seq_length}")
    if not reader.has_spans:
        return _Stream(reader, seq_length)
    if padding is None:
        raise DataError(
            f"{reader.prefix}: the source holds conversations, and data.padding, which fills them up to "
            "model.seq_length, is not set; set it to predicted_eos, eos or pad (eos or pad with data.packing)"
        )
    kind = PackedConversations if padding.is_behind_several else Conversations
    return kind(reader, seq_length, padding)


class _Stream(Division):
    """Documents joined end to end."""

    def __init__(self, reader: IndexedReader, seq_length: int) -> None:
        if reader.num_tokens < seq_length:
            raise DataError(
                f"{reader.prefix}: wanted at least one sequence of {seq_length} tokens, found {reader.num_tokens} in "
                "all; give more text or lower model.seq_length"
            )
        self._reader, self._length = reader, seq_length

    def __len__(self) -> int:
        return self._reader.num_tokens // self._length

    def tokens(self, place: int) -> np.ndarray:
        """Return a sequence: [L] int64."""
        return self._reader.tokens(place * self._length, self._length)

    def first_token(self, place: int) -> int:
        """Return the index of its first token in the source's stream."""
        return place * self._length

    def extent(self, sequences: int) -> int:
        """Return the number of tokens at the start of the stream that hold the first `sequences` sequences."""
        return sequences * self._length


class Conversations(Division):
    """Conversations, each of which is a sequence."""

    def __init__(self, reader: IndexedReader, seq_length: int, padding: Padding) -> None:
        starts, prompts = reader.conversation_starts()
        self._kept = np.flatnonzero(prompts < seq_length)
        if not self._kept.size:
            raise DataError(
                f"{reader.prefix}: wanted a conversation whose answer begins within model.seq_length = {seq_length} "
                f"tokens, found none among {reader.num_documents:,}, of which the shortest prompt has "
                f"{prompts.min():,} tokens; raise model.seq_length"
            )
        lengths = np.diff(starts, append=reader.num_tokens)
        self._starts, self._ends = starts[self._kept], (starts + lengths)[self._kept]
        self.left_out = reader.num_documents - self._kept.size
        """Number of conversations that are left out, since all of their answers would be cut away."""
        self.cut = int((lengths[self._kept] > seq_length).sum())
        """Number of the others that are cut."""
        self._reader, self._length, self._padding = reader, seq_length, padding

    def __len__(self) -> int:
        return self._kept.size

    def tokens(self, place: int) -> np.ndarray:
        """Return a sequence: [L] int64."""
        return self._filled_up([self._ids(place)], self._padding.token)

    def predicted(self, place: int) -> np.ndarray:
        """Return which of its tokens belong to an answer or are predicted padding: [L] bool."""
        return self._filled_up([self._answers(place)], self._padding.is_predicted)

    def first_token(self, place: int) -> int:
        """Return the index of its first token in the source's stream."""
        return int(self._starts[place])

    def extent(self, sequences: int) -> int:
        """Return the number of tokens at the start of the stream that hold the first `sequences` sequences."""
        return int(self._ends[sequences - 1]) if sequences else 0

    def _size(self, one: int) -> int:
        """Return the number of tokens of a conversation, those that are cut left out."""
        return min(int(self._ends[one] - self._starts[one]), self._length)

    def _ids(self, one: int) -> np.ndarray:
        return self._reader.tokens(int(self._starts[one]), self._size(one))

    def _answers(self, one: int) -> np.ndarray:
        return self._reader.answers(int(self._kept[one]))[: self._length]

    def _filled_up(self, parts: Sequence[np.ndarray], value: int) -> np.ndarray:
        found = np.concatenate(parts)
        return np.pad(found, (0, self._length - found.size), constant_values=value)


class PackedConversations(Conversations):
    """Conversations of which several share a sequence, in the order of the file, without any being cut for it.

    Each joins the sequence whose room it fills best, of those that are still open (`packed_sequences`). What fills a
    sequence up is given to the model, belongs to no conversation, and is predicted by none.
    """

    def __init__(self, reader: IndexedReader, seq_length: int, padding: Padding) -> None:
        super().__init__(reader, seq_length, padding)
        lengths = np.minimum(self._ends - self._starts, seq_length)
        sequence = packed_sequences(lengths, seq_length)
        self._order = np.argsort(sequence, kind="stable")
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(sequence))])
        self.conversations = self._kept.size
        """Number of conversations that are packed."""
        self.filled = int(lengths.sum()) / (len(self) * seq_length)
        """Share of the sequences' tokens that belong to conversations."""

    def __len__(self) -> int:
        return self._bounds.size - 1

    def _members(self, place: int) -> list[int]:
        """Return the places of a sequence's conversations among all that are kept."""
        return self._order[self._bounds[place] : self._bounds[place + 1]].tolist()

    def tokens(self, place: int) -> np.ndarray:
        """Return a sequence: [L] int64."""
        return self._filled_up([self._ids(one) for one in self._members(place)], self._padding.token)

    def predicted(self, place: int) -> np.ndarray:
        """Return which of its tokens belong to an answer: [L] bool."""
        return self._filled_up([self._answers(one) for one in self._members(place)], False)

    def documents(self, place: int) -> np.ndarray:
        """Return the number, from 0, of the conversation of each token, and another for what fills up: [L] int64."""
        sizes = [self._size(one) for one in self._members(place)]
        return self._filled_up([np.repeat(np.arange(len(sizes)), sizes)], len(sizes))

    def held(self, place: int) -> list[tuple[int, int]]:
        """Return the place of each conversation's first token in the sequence, and its index in the source."""
        found, start = [], 0
        for one in self._members(place):
            found.append((start, int(self._kept[one])))
            start += self._size(one)
        return found

    def first_token(self, place: int) -> int:
        """Return the index of its first token in the source's stream."""
        return super().first_token(self._members(place)[0])

    def extent(self, sequences: int) -> int:
        """Return the number of tokens up to the end of the conversation that begins the last of `sequences` sequences.

        A file that grows gives conversations to sequences that were still open, and these tokens stay the same.
        """
        return super().extent(self._members(sequences - 1)[0] + 1) if sequences else 0


def content_of(reader: IndexedReader, division: Division) -> str:
    """Return a SHA-256 (hex) of a source's content, as it is divided (`as_divided`)."""
    return as_divided(reader.content_fingerprint(), division)


def as_divided(fingerprint: str, division: Division) -> str:
    """Return a SHA-256 (hex) for that of tokens: itself, and another where they are packed.

    Packed sequences are others, so a run that begins to pack, or ends it, goes on from none that it has read.
    """
    is_packed = isinstance(division, PackedConversations)
    return hashlib.sha256(f"packed {fingerprint}".encode()).hexdigest() if is_packed else fingerprint


def packed_sequences(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """Return the sequence, from 0, that each conversation joins, by best fit in the order given: [n] int64.

    Of the sequences that are open, at most `OPEN_SEQUENCES`, a conversation joins the one with the least room that
    holds it, and of several the oldest. If there is none it begins the next sequence; of one too many that are open,
    the one with the least room is closed. So where a conversation goes depends on those before it alone, and is found
    in a few comparisons.

    Args:
        lengths: number of tokens of each conversation, [n], from 1 to L.
        seq_length: L.
    """
    return np.fromiter(_best_fits(lengths, seq_length), dtype=np.int64, count=lengths.size)


def _best_fits(lengths: np.ndarray, seq_length: int) -> Iterator[int]:
    rooms: list[tuple[int, int]] = []  # open sequences in ascending order: tokens left, and the sequence
    begun = 0
    for start in range(0, lengths.size, 2**16):  # as Python's integers a part at a time
        for length in lengths[start : start + 2**16].tolist():
            place = bisect_left(rooms, (length, -1))
            if place < len(rooms):
                room, sequence = rooms.pop(place)
            else:
                room, sequence = seq_length, begun
                begun += 1
            if room > length:
                insort(rooms, (room - length, sequence))
                if len(rooms) > OPEN_SEQUENCES:
                    del rooms[0]
            yield sequence


def joined_documents(
    documents: Sequence[np.ndarray | None], seq_length: int, counts: Sequence[int] = ()
) -> np.ndarray | None:
    """Return the documents of the tokens of several groups of sequences, as one array.

    Args:
        documents: of each group [B, L] int64, or [L] of a single sequence; None if every sequence is one document.
        seq_length: L.
        counts: B of each group; by default 1.

    Returns:
        [sum of B, L] int64; None if every entry is None.
    """
    return _joined(documents, seq_length, counts, np.int64(0))


def joined_masks(masks: Sequence[np.ndarray | None], seq_length: int, counts: Sequence[int] = ()) -> np.ndarray | None:
    """Return which tokens of several groups of sequences are to be predicted, as one array.

    Args:
        masks: of each group [B, L] bool, or [L] of a single sequence; None for all tokens.
        seq_length: L.
        counts: B of each group; by default 1.

    Returns:
        [sum of B, L] bool; None if every mask is None.
    """
    return _joined(masks, seq_length, counts, np.bool_(True))


def _joined(
    groups: Sequence[np.ndarray | None], seq_length: int, counts: Sequence[int], absent: np.generic
) -> np.ndarray | None:
    """Return the arrays of all groups, with `absent` for each token of a group without one."""
    if all(group is None for group in groups):
        return None
    pairs = zip(groups, counts or [1] * len(groups), strict=True)
    return np.concatenate(
        [np.full((count, seq_length), absent) if group is None else np.atleast_2d(group) for group, count in pairs]
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


class ShuffledSequences:
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
        self._whole = ShuffledSequences(reader, seq_length, seed=seed, name=position.name, division=division)
        self._parts = [
            ShuffledSequences(
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

    def _found(self, number: int) -> tuple[ShuffledSequences, int]:
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
        sources: Sequence[ShuffledSequences | GrownSequences],
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
