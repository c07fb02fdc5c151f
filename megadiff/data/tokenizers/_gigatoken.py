# ruff: noqa: RUF001 - the strings are meant to be hard to tell apart
"""The `gigatoken` library in place of `tokenizers`, for tokenizers for which it proves to give the same ids.

It is many times as fast and knows the usual ways to split text, but not all. The proof compares both on strings that
are hard to split and on a sample of the corpus. While a corpus is tokenized, a stretch of each batch is compared too.
Texts are encoded one after another in one thread: arrays of ids cost a third of the lists that batches would give.

Unicode's normal forms depend on the version of Unicode that a library knows: combining marks that are newer than the
version of `tokenizers` stay where they are there, and are moved here. So texts get their normal form from `tokenizers`.
What is a letter, where texts are split, depends on it too: words with a character whose category is not as old as
Unicode 3.2 (an emoji, a letter of a rare script) are encoded by `tokenizers`. Texts are cut there between visible ASCII
characters, behind a single line end or before a space, where the known patterns always split them; texts of other
tokenizers stay whole. Characters as old as that have had the same normal forms ever since, so Python finds the texts
that have theirs already.
"""

from __future__ import annotations

import functools
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, cast

import numpy as np
import orjson
from tokenizers import normalizers

from megadiff.data.tokenizers import Tokenizer
from megadiff.data.tokenizers._pipeline import Pipeline
from megadiff.errors import DataError, MegadiffError

_SPLITS = {
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
}
"""Patterns with the spelling of the same pattern that the library knows."""

_CUT = re.compile(r"[!-~](?:\n(?=[!-~])|(?= ))")
"""Ends of parts into which a text can be cut, if its tokenizer has one of those patterns or GPT-2's."""

_RENEW_CHARACTERS = 2**27
"""Number of characters after which the library is loaded again: it keeps every word that it has seen."""

_SETTLED = ((0x3400, 0x4DB5), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0x20000, 0x2A6D6))
"""The large blocks of Unicode 3.2, each with one category ever since: ideographs, Hangul and private use."""

_OLD = (
    *((0x0, 0x33FF), (0xA000, 0xA4CF), (0xF900, 0xFFFD)),
    *((0x10300, 0x1044D), (0x1D000, 0x1D7FF), (0x2F800, 0x2FA1D)),
)
"""Ranges with all other characters below U+30000 of Unicode 3.2."""

_COMPARED_CHARACTERS = 2**12
_LONG_CHARACTERS = 2**18
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_HARD = (
    "",
    " ",
    "\n",
    "  a  b   c    ",
    "\r\n\r\n \r \n",
    "\t\ta\tb",
    "don't I'll we'VE they'Re 'S 'ſ x'ſx K's'd'M",
    "1 12 123 1234 1234567 １２３４ ١٢٣٤ ⅷ²½",
    "naïve café e\u0301 a\u0308\u0323 \u1100\u1161\u11a8 각 ﬁ ǆ ẞ İi",
    "中文、日本語。한국어 ไทย हिन्दी العربية עברית",
    "👩‍👩‍👧‍👦 🇩🇪 ✊🏿 \U0001f9d1\u200d\U0001f680",
    "\ufeff\u200b\u200d\u00ad\u2060\u180e",
    "\x00\x01\x1c\x1f\x7f\x85\u00a0\u1680\u2000\u2028\u2029\u202f\u205f\u3000",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff \ufffd \ufffe",
    "<|bos|><|eos|><|pad|><|mask|><|endoftext|></s><s><unk><mask>[MASK][CLS]",
    "http://a.b/c?d=e&f#g user@example.org x_y __init__ a->b !== ///* */ {{}} $1,000.00",
    "a" * 3000,
    " " * 3000,
    "é" * 1000 + "\n" * 500 + "1" * 500,
    "one;\ntwo 👩\n'll three\n#4 \n five\n\nsix\n7\n8🤍\n\t9\r\nten\n",
)
_POOL = "aZéß'’ \t\n\r.,-_/<|>09٣½中ア가\u0301\u1161\u00a0\u3000\u2028\u200dſK𝔘👩\x00\x85sStTmMdDlLrReEvV"


class UnfitError(DataError):
    """The library cannot take the place of `tokenizers` for a tokenizer."""


class OtherIdsError(MegadiffError):
    """Other ids than those of `tokenizers` while a corpus is tokenized, for which no document is to blame."""


class GigatokenTokenizer:
    """A tokenizer whose batches and long texts the library encodes; everything else is the tokenizer's own.

    Args:
        tokenizer: the tokenizer.

    Raises:
        UnfitError: the library is not installed or does not know the tokenizer's rules.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer, Pipeline):
            raise UnfitError("it takes tokenizers of a tokenizer.json only")
        self._tokenizer = tokenizer
        self._definition = _plain(tokenizer.definition)
        self._form, self._normal_form = _normal_form(self._definition)
        self._has_cuts = _has_cuts(self._definition)
        self._names = [token["content"] for token in self._definition["added_tokens"]]
        self._forbidden = np.array(sorted(tokenizer.never_text), dtype=np.uint32)
        self._since_renewal = self._batches = 0
        self._library = self._loaded()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text.

        Raises:
            OtherIdsError: the ids of the text that is compared differ from those of `tokenizers`.
        """
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text: [n] uint32.

        Raises:
            OtherIdsError: as for `encode_batch`.
        """
        if not texts:
            return []
        self._renew(sum(map(len, texts)))
        try:
            found = self._encoded(texts)
        except Exception:  # whatever is wrong with a text is named by the tokenizer itself
            return self._by_tokenizers(texts)
        if np.isin(np.concatenate(found), self._forbidden).any():
            return self._by_tokenizers(texts)
        self._batches += 1
        place = self._batches % len(texts)
        self._compare(texts[place], found[place])
        return found

    def encode_pieces(self, text: str) -> Iterator[list[int]]:
        """Yield the ids of a text, a long one in pieces.

        Raises:
            OtherIdsError: as for `encode_batch`.
        """
        if not self._has_cuts:
            yield from self._tokenizer.encode_pieces(text)
            return
        start = 0
        while start < len(text):
            cut = _CUT.search(text, start + _LONG_CHARACTERS, start + 2 * _LONG_CHARACTERS)
            end = len(text) if cut is None else cut.end()
            if end > start + 2 * _LONG_CHARACTERS:
                yield from self._tokenizer.encode_pieces(text[start:])
                return
            yield from self.encode_batch([text[start:end]])
            start = end

    def prove(self, sample: Sequence[str]) -> None:
        """Compare with `tokenizers` on hard strings and on a sample of the corpus.

        Raises:
            UnfitError: the ids of a text differ.
        """
        texts = [*hard_strings(), *sample]
        try:
            wanted = self._tokenizer.encode_batch(texts)
        except DataError:  # a document at fault is reported where the corpus is read
            texts = list(filter(self._is_taken, texts))
            wanted = self._tokenizer.encode_batch(texts)
        found = self._encoded(texts)
        for text, ids, other in zip(texts, wanted, found, strict=True):
            if ids != other.tolist():
                raise UnfitError(f"it gives other ids for {text[:40]!r}")

    def _encoded(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text: by the library, but for words that `tokenizers` alone is sure to encode."""
        parts = [self._parts(text) for text in texts]
        newer = [part for part, is_settled in chain.from_iterable(parts) if not is_settled]
        by_tokenizers = iter(self._by_tokenizers(newer))
        found: list[np.ndarray] = []
        for of_text in parts:
            ids = [self._by_library(part) if is_settled else next(by_tokenizers) for part, is_settled in of_text]
            found.append(ids[0] if len(ids) == 1 else np.concatenate(ids))
        return found

    def _is_taken(self, text: str) -> bool:
        """Return whether `tokenizers` gives ids for a text."""
        try:
            self._tokenizer.encode(text)
        except DataError:
            return False
        return True

    def _by_library(self, text: str) -> np.ndarray:
        form = self._normal_form
        if form is None or text.isascii() or unicodedata.is_normalized(self._form, text):
            return self._library.encode(text)
        return self._library.encode(form(text))

    def _by_tokenizers(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, dtype=np.uint32) for ids in self._tokenizer.encode_batch(texts)]

    def _parts(self, text: str) -> list[tuple[str, bool]]:
        """Return a text in parts whose ids are those of the text, each with whether the library may encode it."""
        if text.isascii():
            return [(text, True)]
        if self._has_name(text):
            return [(text, False)]
        newer = unsettled().search(text)
        if newer is None or not self._has_cuts:
            return [(text, newer is None)]
        parts: list[tuple[str, bool]] = []
        end = 0
        while newer is not None:
            start, cut = _last_cut(text, end, newer.start()), _CUT.search(text, newer.start())
            if start > end:
                parts.append((text[end:start], True))
            end = len(text) if cut is None else cut.end()
            parts.append((text[start:end], False))
            newer = unsettled().search(text, end)
        return parts if end == len(text) else [*parts, (text[end:], True)]

    def _has_name(self, text: str) -> bool:
        """Return whether a text has a name that was added to the vocabulary, found before or after its normal form."""
        if self._normal_form is None or not self._names:
            return False
        normal = self._normal_form(text)
        return any(name in text or name in normal for name in self._names)

    def _compare(self, text: str, found: np.ndarray) -> None:
        """Compare the ids of a text, or those of a stretch of a long one, with those of `tokenizers`."""
        if len(text) <= _COMPARED_CHARACTERS:
            self._refuse_others(text, found)
            return
        start = self._batches * _COMPARED_CHARACTERS % (len(text) - _COMPARED_CHARACTERS)
        stretch = text[start : start + _COMPARED_CHARACTERS]
        with suppress(DataError):  # its ends may cut words, and so leave a name that no text may hold
            self._refuse_others(stretch, *self._encoded([stretch]))

    def _refuse_others(self, text: str, found: np.ndarray) -> None:
        if self._tokenizer.encode_batch([text]) != [found.tolist()]:
            raise OtherIdsError(
                f"--backend: gigatoken gives other ids than tokenizers for {text[:40]!r}; repeat the command with "
                "--backend tokenizers, in a new folder"
            )

    def _renew(self, characters: int) -> None:
        self._since_renewal += characters
        if self._since_renewal > _RENEW_CHARACTERS:
            self._since_renewal = characters
            self._library = self._loaded()

    def _loaded(self) -> Any:
        try:
            import gigatoken  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UnfitError("it is not installed; pip install 'megadiff[gigatoken]'") from None
        try:
            return gigatoken.Tokenizer.from_json(orjson.dumps(self._definition))
        except Exception as error:
            why = str(error).partition("\n")[0][:120]
            raise UnfitError(f"it does not know the tokenizer's rules ({why})") from error


def with_gigatoken(tokenizer: Tokenizer, *, sample: Sequence[str] = ()) -> Tokenizer:
    """Return the tokenizer with the library's speed.

    Args:
        tokenizer: the tokenizer.
        sample: texts of the corpus.

    Raises:
        UnfitError: the library cannot be used, or gives other ids.
    """
    fast = GigatokenTokenizer(tokenizer)
    fast.prove(sample)
    return cast(Tokenizer, fast)


def hard_strings() -> Iterator[str]:
    """Yield strings that are hard to split, the same ones each time: chosen ones, and mixtures of their characters."""
    yield from _HARD
    draw = random.Random(0)
    for _ in range(2000):
        yield "".join(draw.choices(_POOL, k=draw.randint(1, 24)))


@functools.cache
def unsettled() -> re.Pattern[str]:
    """Return a pattern that finds characters whose category is not the same in Unicode 3.2 and in Python's Unicode.

    Libraries that know different versions of Unicode may differ in them.
    """
    old, new = unicodedata.ucd_3_2_0.category, unicodedata.category
    codes = chain.from_iterable(range(first, last + 1) for first, last in _OLD)
    settled = [code for code in codes if old(chr(code)) == new(chr(code)) != "Cn"]
    starts = [code for code, before in zip(settled, [-2, *settled], strict=False) if code != before + 1]
    ends = [code for code, after in zip(settled, [*settled[1:], -2], strict=True) if code + 1 != after]
    every = [*zip(starts, ends, strict=True), *_SETTLED]
    ranges = "".join(f"\\U{start:08x}-\\U{end:08x}" for start, end in every)
    return re.compile(f"[^{ranges}]")


def _last_cut(text: str, start: int, end: int) -> int:
    """Return the last place in a stretch of a text at which it can be cut, which may be its start."""
    characters = 64
    while True:
        begin = max(start, end - characters)
        cuts = [found.end() for found in _CUT.finditer(text, begin, end)]
        if cuts or begin == start:
            return cuts[-1] if cuts else start
        characters *= 8


def _normal_form(plain: dict[str, Any]) -> tuple[Any, Callable[[str], str] | None]:
    """Take a Unicode normal form out of a definition and return its name and function; an empty one if it has none.

    Raises:
        UnfitError: the form is one of several steps, between which it cannot be taken out.
    """
    normalizer = plain.get("normalizer") or {}
    if (name := normalizer.get("type")) in _FORMS:
        plain["normalizer"] = None
        return name, getattr(normalizers, name)().normalize_str
    if any(f'"{form}"' in json.dumps(normalizer) for form in _FORMS):
        raise UnfitError("its normal form of Unicode is one of several steps")
    return "", None


def _has_cuts(plain: dict[str, Any]) -> bool:
    """Return whether the ids of a text are those of its parts between `_CUT`, by what `_plain` returned.

    Text has to be split by a known pattern. Under each, white space begins a word or is one, but for line ends behind
    punctuation, and a single line end before a visible character ends one. So words end at cuts, whatever is around.
    Nothing else may depend on where a text begins, and no name may hold white space or take it from beside itself.
    """
    if plain.get("normalizer") is not None:
        return False
    names = plain["added_tokens"]
    if any(token.get("lstrip") or token.get("rstrip") or re.search(r"\s", token["content"]) for token in names):
        return False
    before = plain.get("pre_tokenizer") or {}
    is_split = False
    for step in before.get("pretokenizers", [before]):
        if step.get("type") == "ByteLevel" and not step.get("add_prefix_space", True):
            is_split |= step.get("use_regex", True)
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step.get("pattern")
            if not isinstance(pattern, dict) or pattern.get("Regex") not in _SPLITS.values():
                return False
            is_split = True
        else:
            return False
    return is_split


def _plain(definition: dict[str, Any]) -> dict[str, Any]:
    """Return a definition in which no text is a special token, and splits are spelled as the library does."""
    plain = {**definition, "post_processor": None, "truncation": None, "padding": None}
    plain["added_tokens"] = [token for token in definition.get("added_tokens", []) if not token.get("special")]
    before = definition.get("pre_tokenizer") or {}
    if "pretokenizers" in before:
        plain["pre_tokenizer"] = {**before, "pretokenizers": list(map(_respelled, before["pretokenizers"]))}
    elif before:
        plain["pre_tokenizer"] = _respelled(before)
    return plain


def _respelled(step: dict[str, Any]) -> dict[str, Any]:
    """Return a step of a pre-tokenizer with its pattern as the library spells it."""
    pattern = step.get("pattern")
    if not isinstance(pattern, dict) or pattern.get("Regex") not in _SPLITS:
        return step
    return {**step, "pattern": {**pattern, "Regex": _SPLITS[pattern["Regex"]]}}
