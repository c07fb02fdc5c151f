"""Texts of single tokens within a sequence, to show it to people token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from megadiff.data.tokenizers import Tokenizer

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
