"""A `tokenizer.json` as it is used here and shipped: text never yields a special id, and the ids have no holes.

`transformers` reads the shipped file with the same library, so what holds here holds there. A special token's name in
a text is text: the library leaves special tokens alone when it is asked to (`split_special_tokens` in
`tokenizer_config.json`), and where the model's own vocabulary would still find the name, a split inside the name, put
behind the file's own pre-tokenizers, keeps the whole name from it.

A long text is tokenized in overlapping windows. Two of them are joined where they agree: inside their overlap, amid a
stretch of tokens that both have with the same ids at the same characters. A token depends on the text near it, so there
the ids are those of the whole text; where no such stretch is found, the overlap grows until it is.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from megadiff.data.tokenizers._special import SpecialIds
from megadiff.errors import DataError

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


_NOT_APPLIED = ("truncation", "padding", "post_processor")
"""Keys of a `tokenizer.json` that play no part in what a text's ids are."""

_UNUSED = "<|unused {}|>"
_UNUSED_PATTERN = r"<(?=\|unused \d+\|>)"


class Pipeline:
    """Text to ids by a definition as `without_specials_in_text` returns it, and back.

    Args:
        definition: content of a `tokenizer.json`.
        ids: special ids that belong to it.
        inner: the library's reading of the definition, where there is one already.
    """

    def __init__(
        self, definition: dict[str, Any], ids: SpecialIds, *, inner: tokenizers.Tokenizer | None = None
    ) -> None:
        self.definition = definition
        self._inner = inner or opened(definition)
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True  # `<|mask|>` in a text is eight characters of text, not the mask
        self._specials, self.never_text = ids.all, ids.never_text

    @cached_property
    def _live(self) -> frozenset[int]:
        return frozenset(self._inner.get_vocab(with_added_tokens=True).values())

    @property
    def special_names(self) -> list[str]:
        """Names of the definition's special tokens."""
        return [token["content"] for token in self.definition.get("added_tokens", [])]

    def with_special_names(self) -> tokenizers.Tokenizer:
        """Return the library's tokenizer for texts in which the name of a special token means the token."""
        return opened({**self.definition, "post_processor": None, "truncation": None, "padding": None})

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without specials."""
        return [token for piece in self.encode_pieces(text) for token in piece]

    def encode_pieces(self, text: str) -> Iterator[list[int]]:
        """Yield the ids of a text, a long one in windows."""
        pieces = [self._encoded(text).ids] if len(text) <= WINDOW_CHARACTERS else encoded_in_windows(text, self._tokens)
        for piece in pieces:
            self._refuse_special(piece)
            yield piece

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of each text; the library uses all cores unless TOKENIZERS_PARALLELISM=false."""
        ordinary = [text for text in texts if len(text) <= WINDOW_CHARACTERS]
        try:
            encodings = iter(self._inner.encode_batch_fast(ordinary, add_special_tokens=False))
        except Exception:  # the library raises bare Exception; the text at fault is named by `encode`
            return [self.encode(text) for text in texts]
        found = [next(encodings).ids if len(text) <= WINDOW_CHARACTERS else self.encode(text) for text in texts]
        for ids in found:
            self._refuse_special(ids)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of any ids; special and unknown ones are left out."""
        known = [int(i) for i in ids if int(i) in self._live and int(i) not in self._specials]
        return self._inner.decode(known, skip_special_tokens=True)

    def _encoded(self, text: str) -> tokenizers.Encoding:
        try:
            return self._inner.encode(text, add_special_tokens=False)
        except TypeError as error:
            raise DataError(f"{text[:40]!r} cannot be tokenized: it is no valid Unicode text") from error
        except Exception as error:  # such as a word that is not in a vocabulary without an unknown token
            raise DataError(f"{text[:40]!r} cannot be tokenized ({error})") from error

    def _tokens(self, text: str) -> Tokens:
        found = self._encoded(text)
        return Tokens(np.array(found.ids, dtype=np.int64), np.array(found.offsets, dtype=np.int64).reshape(-1, 2))

    def _refuse_special(self, ids: list[int]) -> None:
        if not self.never_text.isdisjoint(ids):
            token = next(i for i in ids if i in self.never_text)
            raise DataError(
                f"the tokenizer turns its text into the special token {self._inner.id_to_token(token)!r} (id {token}); "
                "a model cannot tell it from a real one"
            )


def opened(definition: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Return the library's tokenizer of a definition."""
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


def unknown_id(definition: Mapping[str, Any], inner: tokenizers.Tokenizer) -> int | None:
    """Return the id that stands in for text outside the vocabulary; None where the model has none."""
    model = definition["model"]
    if isinstance(model.get("unk_id"), int):
        return model["unk_id"]
    name = model.get("unk_token")
    return inner.token_to_id(name) if isinstance(name, str) else None


def applied(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return a definition without the settings that play no part in a text's ids."""
    return {key: value for key, value in definition.items() if key not in _NOT_APPLIED}


def without_specials_in_text(
    definition: dict[str, Any], inner: tokenizers.Tokenizer, ids: SpecialIds, vocabulary: Mapping[str, int]
) -> dict[str, Any]:
    """Return a definition with the same ids whose text never yields a special one, and whose ids have no holes.

    A definition that needs no change is returned as it is; one that was changed before needs none.

    Args:
        definition: content of a `tokenizer.json`.
        inner: the library's reading of it.
        ids: special ids that belong to it.
        vocabulary: ids of all its tokens, those of added tokens among them.
    """
    changed = {**definition, "model": dict(definition["model"])}
    changed["added_tokens"] = [dict(token) for token in definition.get("added_tokens", [])]
    if changed["model"].get("dropout"):
        changed["model"]["dropout"] = None  # it would draw other ids for the same text each time
    changed["pre_tokenizer"] = copy.deepcopy(definition.get("pre_tokenizer"))
    unused = _fill_holes(changed, vocabulary)
    names = [name for i in sorted(ids.never_text) if (name := inner.id_to_token(i)) is not None]
    for token in changed["added_tokens"]:
        if token["content"] in names:
            token["special"] = True
    names = _findable(changed, names)
    found = [re.escape(name[0]) + f"(?={re.escape(name[1:])})" for name in names]
    if unused:
        found.append(_UNUSED_PATTERN)
    _split_inside(changed, found)
    return definition if changed == definition else changed


def _fill_holes(definition: dict[str, Any], found: Mapping[str, int]) -> bool:
    """Give every id a token, since readers count tokens where ids end; return whether there are such tokens."""
    model = definition["model"]
    if not isinstance(model.get("vocab"), dict):
        return False  # a list of pieces has no holes
    holes = sorted(set(range(max(found.values()) + 1)) - set(found.values()))
    if holes:
        model["vocab"] = {**model["vocab"], **found, **{_UNUSED.format(hole): hole for hole in holes}}
        definition["added_tokens"] += [_special_token(_UNUSED.format(hole), hole) for hole in holes]
    return any(name == _UNUSED.format(place) for name, place in model["vocab"].items())


def _special_token(name: str, token: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": name, **flags, "special": True}


def _findable(definition: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Return the names of which the model may yield the token for a piece of text that holds the name."""
    model = definition["model"]
    vocabulary = model.get("vocab", {})
    known = vocabulary if isinstance(vocabulary, dict) else _pieces(vocabulary)
    # A name of one character cannot be split; `Pipeline` refuses texts that hold it.
    names = [name for name in names if len(name) > 1 and name in known]
    if not names or (model.get("type") != "BPE" and "merges" not in model) or model.get("ignore_merges"):
        return names
    merged = set(names).intersection(map(_merged, model["merges"]))
    return [name for name in names if name in merged]


def _pieces(vocabulary: Sequence[Sequence[Any]]) -> set[str]:
    return {piece[0] for piece in vocabulary}


def _merged(merge: str | Sequence[str]) -> str:
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)


def _split_inside(definition: dict[str, Any], patterns: Sequence[str]) -> None:
    """Put a split at these patterns behind the pre-tokenizers, if it is not there yet."""
    if not patterns:
        return
    split = {
        "type": "Split",
        "pattern": {"Regex": "|".join(patterns)},
        "behavior": "Isolated",
        "invert": False,
    }
    before = definition.get("pre_tokenizer")
    if before is None:
        definition["pre_tokenizer"] = split
    elif before.get("type") == "Sequence":
        if split not in before["pretokenizers"]:
            before["pretokenizers"].append(split)
    elif before != split:
        definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [before, split]}
