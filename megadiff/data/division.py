"""Division of a source into sequences of L tokens, by their places 0, 1, 2, ... in the file.

Text is one stream: documents are joined end to end and cut at every L tokens, and the rest at the end, less than one
sequence, is never used. Conversations are sequences of their own: each is cut at L tokens or filled up, and one whose
answers would all be cut away is left out. Several short ones can share a sequence (`PackedConversations`).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from megadiff.data.indexed_reader import IndexedReader
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
    """The sequences of a source."""

    def __len__(self) -> int: ...

    def tokens(self, place: int) -> np.ndarray:
        """Return a sequence: [L] int64."""
        ...

    def predicted(self, place: int) -> np.ndarray | None:
        """Return which of its tokens are to be predicted, [L] bool; None for all."""
        ...

    def documents(self, place: int) -> np.ndarray | None:
        """Return the number, from 0, of the document of each of its tokens, [L] int64; None if all belong together.

        Tokens of one document do not attend to those of another. What fills a sequence up is a document too.
        """
        ...

    def held(self, place: int) -> list[tuple[int, int]] | None:
        """Return the place of each document's first token in the sequence, and its index in the source; None as above.

        What fills the sequence up is none of them.
        """
        ...

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
            "model.seq_length, is not set; set it to predicted_eos, eos or pad"
        )
    kind = PackedConversations if padding.is_behind_several else Conversations
    return kind(reader, seq_length, padding)


class _Stream:
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

    def predicted(self, place: int) -> None:
        """Return None: all tokens are predicted."""
        del place

    def documents(self, place: int) -> None:
        """Return None: documents attend to each other."""
        del place

    def held(self, place: int) -> None:
        """Return None: documents attend to each other."""
        del place

    def first_token(self, place: int) -> int:
        """Return the index of its first token in the source's stream."""
        return place * self._length

    def extent(self, sequences: int) -> int:
        """Return the number of tokens at the start of the stream that hold the first `sequences` sequences."""
        return sequences * self._length


class Conversations:
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

    def documents(self, place: int) -> np.ndarray | None:
        """Return None: a conversation attends to all of itself, and to what fills it up."""
        del place
        return None

    def held(self, place: int) -> list[tuple[int, int]] | None:
        """Return None, as for `documents`."""
        del place
        return None

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
    """Return a SHA-256 (hex) of a source's content.

    Packed, it is another one: sequences are others, so a run that begins to pack goes on from none that it has read.
    """
    found = reader.content_fingerprint()
    is_packed = isinstance(division, PackedConversations)
    return hashlib.sha256(f"packed {found}".encode()).hexdigest() if is_packed else found


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
    return np.fromiter(_joined(lengths, seq_length), dtype=np.int64, count=lengths.size)


def _joined(lengths: np.ndarray, seq_length: int) -> Iterator[int]:
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
                del rooms[: len(rooms) - OPEN_SEQUENCES]
            yield sequence


def joined_documents(documents: Sequence[np.ndarray | None], seq_length: int) -> np.ndarray | None:
    """Return the documents of several sequences' tokens as one array: [B, L] int64; None if every one is None.

    Args:
        documents: of each sequence [L], or None for a single document.
        seq_length: L.
    """
    if all(found is None for found in documents):
        return None
    return np.stack([np.zeros(seq_length, dtype=np.int64) if found is None else found for found in documents])


def joined_masks(masks: Sequence[np.ndarray | None], seq_length: int, counts: Sequence[int] = ()) -> np.ndarray | None:
    """Return which tokens of several groups of sequences are to be predicted, as one array.

    Args:
        masks: of each group [B, L] bool, or [L] of a single sequence; None for all tokens.
        seq_length: L.
        counts: B of each group; by default 1.

    Returns:
        [sum of B, L] bool; None if every mask is None.
    """
    if all(mask is None for mask in masks):
        return None
    groups = zip(masks, counts or [1] * len(masks), strict=True)
    return np.concatenate(
        [
            np.ones((count, seq_length), dtype=np.bool_) if mask is None else np.atleast_2d(mask)
            for mask, count in groups
        ]
    )
