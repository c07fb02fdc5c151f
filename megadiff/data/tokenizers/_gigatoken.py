# ruff: noqa: RUF001 - the strings are meant to be hard to tell apart
"""The `gigatoken` library in place of `tokenizers`, for tokenizers for which it proves to give the same ids.

It is many times as fast and knows the usual ways to split text, but not all. The proof compares both on strings that
are hard to split and on a sample of the corpus. While a corpus is tokenized, one text of each batch is compared too.

Unicode's normal forms depend on the version of Unicode that a library knows: combining marks that are newer than the
version of `tokenizers` stay where they are there, and are moved here. So texts get their normal form from `tokenizers`.
What is a letter, where texts are split, depends on it too: lines with a character whose category is not as old as
Unicode 3.2 (an emoji, a letter of a rare script) are encoded by `tokenizers`. Texts are cut there at single line ends
between visible ASCII characters, which the known patterns never split otherwise; texts of other tokenizers stay whole.
"""

from __future__ import annotations

import bisect
import copy
import functools
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, cast

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

_CUT = re.compile(r"[!-~]\n(?=[!-~])")
"""Line ends at which a text can be cut, if its tokenizer has one of those patterns or GPT-2's."""

_RENEW_CHARACTERS = 2**27
"""Number of characters after which the library is loaded again: it keeps every word that it has seen."""

_COMPARED_CHARACTERS = 2**14
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
    """A tokenizer whose batches the library encodes; everything else is the tokenizer's own.

    Args:
        tokenizer: the tokenizer.
        parallel: whether batches use all cores.

    Raises:
        UnfitError: the library is not installed or does not know the tokenizer's rules.
    """

    def __init__(self, tokenizer: Tokenizer, *, parallel: bool) -> None:
        if not isinstance(tokenizer, Pipeline):
            raise UnfitError("it takes tokenizers of a tokenizer.json only")
        self._tokenizer, self._parallel = tokenizer, parallel
        plain = _plain(tokenizer.definition)
        self._normal_form = _normal_form(plain)
        self._has_cuts = _has_cuts(plain)
        self._names = [token["content"] for token in plain["added_tokens"]]
        self._definition = json.dumps(plain)
        self._forbidden = tokenizer.never_text
        self._since_renewal = self._batches = 0
        self._library = self._loaded()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text.

        Raises:
            OtherIdsError: the ids of the text that is compared differ from those of `tokenizers`.
        """
        if not texts:
            return []
        self._renew(sum(map(len, texts)))
        try:
            found = self._encoded(texts)
        except Exception:  # whatever is wrong with a text is named by the tokenizer itself
            return self._tokenizer.encode_batch(texts)
        if not all(map(self._forbidden.isdisjoint, found)):
            return self._tokenizer.encode_batch(texts)
        self._batches += 1
        place = self._batches % len(texts)
        if len(texts[place]) <= _COMPARED_CHARACTERS:
            self._compare(texts[place], found[place])
        return found

    def prove(self, sample: Sequence[str]) -> None:
        """Compare with `tokenizers` on hard strings and on a sample of the corpus.

        Raises:
            UnfitError: the ids of a text differ.
        """
        texts = [*hard_strings(), *sample]
        wanted = self._tokenizer.encode_batch(texts)
        found = self._encoded(texts)
        for text, ids, other in zip(texts, wanted, found, strict=True):
            if ids != other:
                raise UnfitError(f"it gives other ids for {text[:40]!r}")

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text: by the library, but for lines that `tokenizers` alone is sure to encode."""
        form = self._normal_form
        parts = [self._parts(text) for text in texts]
        settled = [part for part, is_settled in chain.from_iterable(parts) if is_settled]
        normal = [part if form is None or part.isascii() else form(part) for part in settled]
        by_library = iter(self._library.encode_batch_list(normal, parallel=self._parallel))
        newer = [part for part, is_settled in chain.from_iterable(parts) if not is_settled]
        by_tokenizers = iter(self._tokenizer.encode_batch(newer))
        found: list[list[int]] = []
        for of_text in parts:
            ids = [next(by_library if is_settled else by_tokenizers) for _, is_settled in of_text]
            found.append(ids[0] if len(ids) == 1 else list(chain.from_iterable(ids)))
        return found

    def _parts(self, text: str) -> list[tuple[str, bool]]:
        """Return a text in parts whose ids are those of the text, each with whether the library may encode it."""
        if text.isascii():
            return [(text, True)]
        if self._has_name(text):
            return [(text, False)]
        newer = [found.start() for found in unsettled().finditer(text)]
        if not newer or not self._has_cuts:
            return [(text, not newer)]
        cuts = [0, *(found.end() for found in _CUT.finditer(text)), len(text)]
        parts: list[tuple[str, bool]] = []
        end = 0
        for place in newer:
            if place < end:
                continue
            after = bisect.bisect_right(cuts, place)
            if cuts[after - 1] > end:
                parts.append((text[end : cuts[after - 1]], True))
            end = cuts[after]
            parts.append((text[cuts[after - 1] : end], False))
        return parts if end == len(text) else [*parts, (text[end:], True)]

    def _has_name(self, text: str) -> bool:
        """Return whether a text has a name that was added to the vocabulary, found before or after its normal form."""
        if self._normal_form is None or not self._names:
            return False
        normal = self._normal_form(text)
        return any(name in text or name in normal for name in self._names)

    def _compare(self, text: str, found: list[int]) -> None:
        if self._tokenizer.encode(text) != found:
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
            return gigatoken.Tokenizer.from_json(self._definition)
        except Exception as error:
            why = str(error).partition("\n")[0][:120]
            raise UnfitError(f"it does not know the tokenizer's rules ({why})") from error


def with_gigatoken(tokenizer: Tokenizer, *, parallel: bool, sample: Sequence[str] = ()) -> Tokenizer:
    """Return the tokenizer with the library's speed.

    Args:
        tokenizer: the tokenizer.
        parallel: whether batches use all cores.
        sample: texts of the corpus.

    Raises:
        UnfitError: the library cannot be used, or gives other ids.
    """
    fast = GigatokenTokenizer(tokenizer, parallel=parallel)
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
    settled = [
        code for code in range(0x30000) if old(chr(code)) == new(chr(code)) and new(chr(code)) not in ("Cn", "Cs")
    ]
    starts = [code for code, before in zip(settled, [-2, *settled], strict=False) if code != before + 1]
    ends = [code for code, after in zip(settled, [*settled[1:], -2], strict=True) if code + 1 != after]
    ranges = "".join(f"\\U{start:08x}-\\U{end:08x}" for start, end in zip(starts, ends, strict=True))
    return re.compile(f"[^{ranges}]")


def _normal_form(plain: dict[str, Any]) -> Callable[[str], str] | None:
    """Take a Unicode normal form out of a definition and return it as a function; None if it has none.

    Raises:
        UnfitError: the form is one of several steps, between which it cannot be taken out.
    """
    normalizer = plain.get("normalizer") or {}
    if (name := normalizer.get("type")) in _FORMS:
        plain["normalizer"] = None
        return getattr(normalizers, name)().normalize_str
    if any(f'"{form}"' in json.dumps(normalizer) for form in _FORMS):
        raise UnfitError("its normal form of Unicode is one of several steps")
    return None


def _has_cuts(plain: dict[str, Any]) -> bool:
    """Return whether the ids of a text are those of its parts between `_CUT`, by what `_plain` returned.

    Text has to be split by a known pattern, under which a single line end between visible ASCII characters ends a word
    or is one, whatever follows. Nothing else may depend on where a text begins, or take white space beside a name.
    """
    if plain.get("normalizer") is not None:
        return False
    if any(token.get("lstrip") or "\n" in token["content"] for token in plain["added_tokens"]):
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
    plain = copy.deepcopy(definition)
    plain["added_tokens"] = [token for token in plain.get("added_tokens", []) if not token.get("special")]
    plain |= {"post_processor": None, "truncation": None, "padding": None}
    before = plain.get("pre_tokenizer") or {}
    for step in before.get("pretokenizers", [before]):
        pattern = step.get("pattern")
        if isinstance(pattern, dict) and pattern.get("Regex") in _SPLITS:
            pattern["Regex"] = _SPLITS[pattern["Regex"]]
    return plain
