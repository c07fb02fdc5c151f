"""Attention patterns: which tokens of its sequence each token attends to, as a few integers on the host.

No pattern is ever an [L, L] mask: attention computes the parts of a pattern by unmasked or causal calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionPattern:
    """The attention of a microbatch of sequences, each with a prefix of its own length P, from 0 to all L tokens.

    Tokens of the prefix attend to the prefix alone: to all of it, or each to itself and those before it. The remaining
    tokens attend to the whole sequence. P = 0 is full bidirectional attention, a causal prefix of P = L is a causal
    language model.

    Or sequences consist of several documents, without prefixes: a token attends to its document alone, to all of it or
    to itself and what comes before.
    """

    prefix_lengths: Tensor
    """P of each sequence, [B] int64 on the CPU."""
    is_causal: bool = False
    """Whether a prefix's, or a document's, tokens attend only to themselves and the tokens before them."""
    documents: Tensor | None = None
    """Number of tokens of each document of a sequence, in order and filled up with zeros, [B, K] int64 on the CPU; None
    where every sequence is one document."""

    @classmethod
    def full(cls, batch_size: int) -> AttentionPattern:
        """Return the pattern in which every token attends to every token."""
        return cls(torch.zeros(batch_size, dtype=torch.int64))

    @classmethod
    def prefix(cls, prefix_lengths: Tensor, *, is_causal: bool = False) -> AttentionPattern:
        """Return the pattern of sequences that begin with prefixes of these lengths, [B]."""
        return cls(prefix_lengths.to("cpu", torch.int64), is_causal)

    @classmethod
    def causal(cls, batch_size: int, length: int) -> AttentionPattern:
        """Return the pattern in which every token attends to itself and the tokens before it."""
        return cls(torch.full((batch_size,), length), is_causal=True)

    @classmethod
    def within(cls, documents: Tensor, *, is_causal: bool = False) -> AttentionPattern:
        """Return the pattern in which every token attends to the tokens of its document.

        Args:
            documents: numbers that differ between neighbouring documents, one for each token, [B, L] on the CPU.
            is_causal: whether a token attends to itself and those before it alone.
        """
        count, length = documents.shape
        begins = torch.zeros(count, length, dtype=torch.int64)
        begins[:, 1:] = documents.diff(dim=1) != 0
        number = begins.cumsum(1)
        most = int(number[:, -1].max()) + 1
        if most == 1:
            return cls.causal(count, length) if is_causal else cls.full(count)
        lengths = torch.zeros(count, most, dtype=torch.int64).scatter_add_(1, number, torch.ones_like(number))
        return cls(torch.zeros(count, dtype=torch.int64), is_causal, lengths)

    def codes(self) -> Tensor | None:
        """Return the pattern as the layers take it: [B] int64, P, negative if causal; None for full attention.

        Of sequences of several documents it is [B, K] int64, the documents' lengths, negative if causal. It is a tensor
        because megatron-core passes only tensors through recomputed layers.
        """
        if self.documents is not None:
            return -self.documents if self.is_causal else self.documents
        if not bool(self.prefix_lengths.any()):
            return None
        return -self.prefix_lengths if self.is_causal else self.prefix_lengths

    def pairs(self, length: int) -> int:
        """Return the number of (query, key) pairs in one layer, over sequences of `length` tokens, without a sink's."""
        if self.documents is not None:
            lengths = self.documents.flatten().tolist()
            return sum(n * (n + 1) // 2 if self.is_causal else n * n for n in lengths)
        prefixes = self.prefix_lengths.tolist()
        own = (p * (p + 1) // 2 if self.is_causal else p * p for p in prefixes)
        return sum(own) + sum(length - p for p in prefixes) * length
