"""Division of a source into sequences of L tokens, by their places 0, 1, 2, ... in the file.

Text is one stream: documents are joined end to end and cut at every L tokens, and the rest at the end, less than one
sequence, is never used. Conversations are sequences of their own: each is cut at L tokens or filled up, and one whose
answers would all be cut away is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import DataError


class Padding(NamedTuple):
    """The token that fills conversations up to a sequence."""

    token: int
    is_predicted: bool
    """Whether the model learns to predict it."""


def padding_of(policy: str | None, tokenizer: Tokenizer) -> Padding | None:
    """Return what `data.padding` means with a tokenizer; None if it is not set.

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
    return Padding(token, policy == "predicted_eos")


class Division(Protocol):
    """The sequences of a source."""

    def __len__(self) -> int: ...

    def tokens(self, place: int) -> np.ndarray:
        """Return a sequence: [L] int64."""
        ...

    def predicted(self, place: int) -> np.ndarray | None:
        """Return which of its tokens are to be predicted, [L] bool; None for all."""
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
    return Conversations(reader, seq_length, padding)


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
        start, end = int(self._starts[place]), int(self._ends[place])
        ids = self._reader.tokens(start, min(end - start, self._length))
        return np.pad(ids, (0, self._length - ids.size), constant_values=self._padding.token)

    def predicted(self, place: int) -> np.ndarray:
        """Return which of its tokens belong to an answer or are predicted padding: [L] bool."""
        mask = self._reader.answers(int(self._kept[place]))[: self._length]
        return np.pad(mask, (0, self._length - mask.size), constant_values=self._padding.is_predicted)

    def first_token(self, place: int) -> int:
        """Return the index of its first token in the source's stream."""
        return int(self._starts[place])

    def extent(self, sequences: int) -> int:
        """Return the number of tokens at the start of the stream that hold the first `sequences` sequences."""
        return int(self._ends[sequences - 1]) if sequences else 0


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
