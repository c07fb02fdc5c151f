"""A long text tokenized in overlapping windows: the ids of the whole text in the memory of a window.

Two windows are joined where they agree: inside their overlap, amid a stretch of tokens that both have with the same
ids at the same characters. A token depends on the text near it, so there the ids are those of the whole text; where
no such stretch is found, the overlap grows until it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

WINDOW_CHARACTERS = 2**16
"""Length of a window; shorter texts are encoded whole."""

OVERLAP_CHARACTERS = 2**12
"""Characters that a window shares with the one before it, at first."""

AGREEMENT_TOKENS = 32
"""Tokens on either side of a seam on which both windows agree."""


class Tokens(NamedTuple):
    """Tokens of a stretch of text."""

    ids: np.ndarray
    """[n] int64."""

    spans: np.ndarray
    """[n, 2] int64, first character of each token and the one behind it, counted in the whole text."""

    def between(self, first: int, last: int | None) -> Tokens:
        """Return the tokens `first` to `last - 1`."""
        return Tokens(self.ids[first:last], self.spans[first:last])


def encoded_in_windows(text: str, encode: Callable[[str], Tokens]) -> Iterator[list[int]]:
    """Yield the ids of a text, piece by piece.

    Args:
        text: text of any length.
        encode: returns the tokens of a stretch of it, with characters counted in the stretch.
    """

    def tokens(start: int, end: int) -> Tokens:
        found = encode(text[start:end])
        return Tokens(found.ids, found.spans + start)

    end = min(WINDOW_CHARACTERS, len(text))
    held, start, done = tokens(0, end), 0, 0
    while end < len(text):
        overlap = OVERLAP_CHARACTERS
        while True:
            begin = max(start, end - overlap)
            next_end = min(begin + max(WINDOW_CHARACTERS, 2 * (end - begin)), len(text))
            following = tokens(begin, next_end)
            seam = _seam(held, following)
            if seam is not None:
                yield held.ids[: seam[0]].tolist()
                done = int(held.spans[seam[0], 0])
                held, start, end = following.between(seam[1], None), begin, next_end
                break
            if begin == start:  # nothing to agree on in the whole window: take both as one
                held = following.between(int(np.searchsorted(following.spans[:, 0], done)), None)
                end = next_end
                break
            overlap *= 4
    yield held.ids.tolist()


def _seam(before: Tokens, after: Tokens) -> tuple[int, int] | None:
    """Return the place of one token in each of two windows, amid the longest stretch of tokens that they share."""
    if not len(before.ids) or not len(after.ids):
        return None
    overlapping = after.between(0, int(np.searchsorted(after.spans[:, 0], before.spans[-1, 1])))
    known = {token: place for place, token in enumerate(_keys(overlapping))}
    first = int(np.searchsorted(before.spans[:, 0], after.spans[0, 0]))
    shared = [known.get(token, -1) for token in _keys(before.between(first, None))]
    length, last = _longest_run(shared)
    if length < 2 * AGREEMENT_TOKENS:
        return None
    for place in range(last - length // 2, last):
        span, previous = before.spans[first + place], before.spans[first + place - 1]
        if span[0] >= previous[1] and span[0] > previous[0]:  # not inside a character that takes several tokens
            return first + place, shared[place]
    return None


def _keys(tokens: Tokens) -> list[tuple[int, int, int]]:
    """Return each token's id and characters."""
    return [
        (token, first, last) for token, (first, last) in zip(tokens.ids.tolist(), tokens.spans.tolist(), strict=True)
    ]


def _longest_run(places: list[int]) -> tuple[int, int]:
    """Return the length and the end of the longest stretch of places that follow each other."""
    best = (0, 0)
    run = 0
    for number, place in enumerate(places):
        follows = number > 0 and place == places[number - 1] + 1 and place > 0
        run = run + 1 if follows and run else int(place >= 0)
        best = max(best, (run, number))
    return best
