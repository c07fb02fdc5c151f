# ruff: noqa: RUF001 - the characters are meant to be hard to tell apart
"""Documents of Unicode that is hard to split and normalise, the same ones for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

_RANGES = {
    "latin": [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF)],
    "combining": [(0x300, 0x36F), (0x483, 0x489), (0x591, 0x5C7), (0x1AB0, 0x1ACE), (0x20D0, 0x20F0), (0xFE20, 0xFE2F)],
    "cjk": [
        (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x2A6DF), (0x2A700, 0x2EBE0), (0x30000, 0x323AF),
        (0xF900, 0xFAD9), (0x2F800, 0x2FA1D), (0x3040, 0x30FF), (0x2E80, 0x2FD5), (0xFF01, 0xFF9F),
    ],
    "hangul": [(0x1100, 0x11FF), (0xAC00, 0xD7A3), (0xA960, 0xA97C), (0xD7B0, 0xD7FB)],
    "rtl": [(0x590, 0x6FF), (0x700, 0x7FF), (0x8A0, 0x8FF), (0xFB1D, 0xFDFF), (0xFE70, 0xFEFC), (0x1E900, 0x1E95F)],
    "indic": [(0x900, 0xD7F), (0xE00, 0xFFF), (0x1000, 0x109F), (0x1780, 0x17F9)],
    "digits": [(0x30, 0x39), (0x660, 0x669), (0xB2, 0xB3), (0x2070, 0x2189), (0x2460, 0x24FF), (0x1D7CE, 0x1D7FF)],
    "symbols": [(0x21, 0x2F), (0x3A, 0x40), (0x2010, 0x2027), (0x2030, 0x205E), (0x20A0, 0x20C0), (0x2190, 0x2BFF)],
    "control": [(0x0, 0x1F), (0x7F, 0x9F), (0xAD, 0xAD), (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F)],
    "any": [(0x0, 0xD7FF), (0xE000, 0x10FFFF)],
}  # fmt: skip
_SPACES = (
    "    \t\n\n\r\r\n\x0b\x0c\x1c\x1d\x1e\x1f\x85\u00a0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
_EMOJI = "👩👨🧑👧👶🐈🏳🏴❤✊👍🇩🇪🇫🇷🇯🇵😀😭☂☎⌚1#*"
_JOINERS = ["\u200d", "\ufe0f", "\ufe0e", "\U0001f3ff", "\U0001f3fb", "\u20e3", "\U000e0067", "\U000e007f", ""]
_WORDS = [
    "the", "don't", "I'LL", "we’ve", "'s", "'ſ", "x'K", "İstanbul", "ﬁne", "ǆ", "ẞ", "naïve", "e\u0301", "__x__",
    "a->b", "1234567", "3.14e-10", "$1,000", "http://a.b/c?d=e", "<|bos|>", "</s>", "[MASK]", "<mask>", "{{}}", "/*",
]  # fmt: skip


def hard_documents(count: int, seed: int = 0) -> Iterator[str]:
    """Yield documents of one to twenty pieces of different kinds."""
    draw = random.Random(seed)
    kinds = [*_RANGES, "spaces", "emoji", "words", "marked", "run"]
    for _ in range(count):
        yield "".join(_piece(draw, draw.choice(kinds)) for _ in range(draw.randint(1, 20)))


def _piece(draw: random.Random, kind: str) -> str:
    if kind == "spaces":
        return "".join(draw.choices(_SPACES, k=draw.choice([1, 2, 3, 8, 60])))
    if kind == "emoji":
        return "".join(draw.choice(_EMOJI) + draw.choice(_JOINERS) for _ in range(draw.randint(1, 8)))
    if kind == "words":
        return draw.choice(["", " "]).join(draw.choices(_WORDS, k=draw.randint(1, 6)))
    if kind == "marked":
        marks = range(draw.randint(1, 6))
        return "".join(_character(draw, "latin") + "".join(_character(draw, "combining") for _ in marks) for _ in marks)
    if kind == "run":
        return _character(draw, draw.choice([*_RANGES])) * draw.choice([2, 3, 4, 17, 100])
    return "".join(_character(draw, kind) for _ in range(draw.randint(1, 12)))


def _character(draw: random.Random, kind: str) -> str:
    return chr(draw.randint(*draw.choice(_RANGES[kind])))
