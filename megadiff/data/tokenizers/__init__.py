"""The tokenizer family: text to token ids and back, one module a member; texts of single tokens.

A module here offers `accepts(path) -> bool` and `build(path) -> Tokenizer`, and `data.tokenizer` is a path that one of
them accepts, or its name and a path (`hf_json:path`). A module of the user's own is named by its dotted path, with an
argument behind a colon if it wants one (`mypkg.words:vocabulary.txt`), and offers `build(argument) -> Tokenizer`; what
its tokenizer may leave out is in `tokenizer_files`. Files that begin with `_` are no members. `megadiff.data.
tokenizer_files` decides which member is meant; `megadiff.testing.check_tokenizer` is the contract as a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol


class Tokenizer(Protocol):
    """Text to token ids and back. Ids are 0 .. vocab_size - 1, and the mask is one of them.

    Text never yields the mask, bos, eos or pad id, not even where it spells one of their names; an id that is the
    unknown token as well, as the padding of some tokenizers is, means unknown text and may occur.
    """

    name: str
    """Name for people: the member's and, where there is one, the file's."""

    fingerprint: str
    """SHA-256 (hex) of everything that decides the ids of a text and the special ids; the same on every machine."""

    vocab_size: int
    """Number of real ids V, the mask among them; entries that only pad a weight matrix are not counted."""

    mask_id: int
    """Id of the mask, which text can never yield."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    @property
    def special_names(self) -> Sequence[str]:
        """Names of special tokens, which are ordinary text where a text spells them."""
        ...

    @property
    def export_limits(self) -> str | None:
        """Reason why Transformers cannot give the same ids from what `export` writes; None if it can."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with nothing put before or after it.

        Raises:
            DataError: the text is no valid Unicode, or has no ids.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of each text, faster."""
        ...

    def encode_pieces(self, text: str) -> Iterator[list[int]]:
        """Yield the ids of `encode` piece by piece, so that those of a long text are never all held as Python lists."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of any ids below V, in any order, without special ones; broken UTF-8 becomes U+FFFD."""
        ...

    def export(self, folder: Path, *, seq_length: int | None = None, prepend_bos: bool = False) -> list[str]:
        """Write the tokenizer's files into the folder of an exported model and return their names.

        If `export_limits` is None, Transformers' `PreTrainedTokenizerFast` reads the ids of training from them.

        Args:
            folder: an existing folder without such files.
            seq_length: number of tokens of a sequence.
            prepend_bos: whether the training data begin each document with bos.

        Raises:
            DataError: the tokenizer cannot be exported; nothing was written.
        """
        ...


MASK = "\u2591"
"""Text of the mask."""

BROKEN = "\ufffd"
"""Text of bytes that are no UTF-8."""

_LONGEST_CHARACTER = 4  # bytes of UTF-8, and so the most tokens that one character can take


def special_texts(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the texts that are shown of ids without text: those of bos, eos, pad and the mask."""
    named = {tokenizer.bos_id: "bos", tokenizer.eos_id: "eos", tokenizer.pad_id: "pad"}
    texts = {token: f"\u27e8{name}\u27e9" for token, name in named.items() if token is not None}
    return {**texts, tokenizer.mask_id: MASK}


def token_text(tokenizer: Tokenizer) -> Callable[[int], str]:
    """Return a function from an id to its text amid others: with the space before it, or its name if it has no text."""
    special = special_texts(tokenizer)

    @cache
    def text(token: int) -> str:
        if token in special:
            return special[token]
        alone, twice = tokenizer.decode([token]), tokenizer.decode([token, token])
        return twice[len(alone) :] if twice.startswith(alone) and len(twice) > len(alone) else alone

    return text


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each token amid those before it, with its leading space.

    Joined, they are the text of the sequence. A character that several tokens form together belongs to the last of
    them, and the others have an empty text; bytes that form none become U+FFFD.

    Args:
        tokenizer: the tokenizer.
        ids: [n] ids below V, noise among them.
    """
    special, texts = special_texts(tokenizer), [""] * len(ids)
    start = done = 0  # ids[start:done] are shown, and what follows is decoded behind them
    for place, token in enumerate(ids):
        if token in special:
            if done < place:  # the character before it stays unfinished
                texts[place - 1] = BROKEN
            texts[place], start, done = special[token], place + 1, place + 1
            continue
        before, after = tokenizer.decode(ids[start:done]), tokenizer.decode(ids[start : place + 1])
        is_open = after.endswith(BROKEN) and place - done + 1 < _LONGEST_CHARACTER
        if is_open and place + 1 < len(ids):
            continue
        texts[place] = after[len(before) :] if after.startswith(before) else tokenizer.decode(ids[done : place + 1])
        start, done = done, place + 1
    return texts
