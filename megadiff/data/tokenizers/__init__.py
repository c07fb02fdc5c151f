"""Tokenizers: a folder as a registry. A member's file offers `accepts(path) -> bool` and `build(path) -> Tokenizer`.

Files that start with `_` are no members. Which member a path means is decided in `megadiff.data.tokenizer_files`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """Text to token ids and back. Ids are 0 .. vocab_size - 1, and the mask is one of them.

    Text never yields the mask, bos, eos or pad id, not even where it spells one of their names; an id that is the
    unknown token as well, as the padding of some tokenizers is, means unknown text and may occur.
    """

    name: str
    """For people: the member's name and, where there is one, the file's."""

    fingerprint: str
    """SHA-256 (hex) of what fixes text -> ids and the special ids; the same on every machine and path."""

    vocab_size: int
    """V: real ids, the mask among them; rows that only pad a weight matrix are not counted."""

    mask_id: int
    """The mask's own id: never one that text can yield."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    @property
    def definition(self) -> dict[str, Any] | None:
        """Content of a `tokenizer.json` with which transformers gives the same ids; None if there is none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text; nothing is put before or after it. `DataError` where it is no valid Unicode."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, faster."""
        ...

    def encode_pieces(self, text: str) -> Iterator[list[int]]:
        """Yield the ids of `encode` piece by piece, so that those of a long text are never all held as Python lists."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of any ids below V, in any order; special ones are left out and broken UTF-8 becomes U+FFFD."""
        ...
