"""A `tokenizer.json` as it is used here and shipped: text never yields a special id, and the ids have no holes.

`transformers` reads the shipped file with the same library, so what holds here holds there. A special token's name in
a text is text: the library leaves special tokens alone when it is asked to (`split_special_tokens` in
`tokenizer_config.json`), and where the model's own vocabulary would still find the name, a split inside the name, put
behind the file's own pre-tokenizers, keeps the whole name from it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from megadiff.data.tokenizers._special import SpecialIds
from megadiff.data.tokenizers._windows import WINDOW_CHARACTERS, Tokens, encoded_in_windows
from megadiff.errors import DataError

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
        self._live = frozenset(self._inner.get_vocab(with_added_tokens=True).values())
        self._specials, self.never_text = ids.all, ids.never_text

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
    definition: dict[str, Any], inner: tokenizers.Tokenizer, ids: SpecialIds
) -> dict[str, Any]:
    """Return a definition with the same ids whose text never yields a special one, and whose ids have no holes.

    A definition that needs no change is returned as it is; one that was changed before needs none.

    Args:
        definition: content of a `tokenizer.json`.
        inner: the library's reading of it.
        ids: special ids that belong to it.
    """
    changed = {**definition, "model": dict(definition["model"])}
    changed["added_tokens"] = [dict(token) for token in definition.get("added_tokens", [])]
    if changed["model"].get("dropout"):
        changed["model"]["dropout"] = None  # it would draw other ids for the same text each time
    changed["pre_tokenizer"] = copy.deepcopy(definition.get("pre_tokenizer"))
    unused = _fill_holes(changed, inner)
    names = [name for i in sorted(ids.never_text) if (name := inner.id_to_token(i)) is not None]
    for token in changed["added_tokens"]:
        if token["content"] in names:
            token["special"] = True
    found = [re.escape(name[0]) + f"(?={re.escape(name[1:])})" for name in names if _is_findable(changed, name)]
    if unused:
        found.append(_UNUSED_PATTERN)
    _split_inside(changed, found)
    return definition if changed == definition else changed


def _fill_holes(definition: dict[str, Any], inner: tokenizers.Tokenizer) -> bool:
    """Give every id a token, since readers count tokens where ids end; return whether there are such tokens."""
    model, found = definition["model"], inner.get_vocab(with_added_tokens=True)
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


def _is_findable(definition: Mapping[str, Any], name: str) -> bool:
    """Return whether the model may yield the token of this name for a piece of text that holds the name."""
    model = definition["model"]
    vocabulary = model.get("vocab", {})
    if len(name) < 2 or not (name in vocabulary if isinstance(vocabulary, dict) else name in _pieces(vocabulary)):
        return False  # a name of one character cannot be split; `Pipeline` refuses texts that hold it
    if model.get("type") != "BPE" and "merges" not in model:
        return True
    return bool(model.get("ignore_merges")) or any(_merged(merge) == name for merge in model["merges"])


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
