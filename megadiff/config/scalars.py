"""Plain YAML words as numbers, truth values or text.

PyYAML's own rules (YAML 1.1) are not used: they read `3e-4` as text, `010` as 8, `12:30` as 750 and `no` as false.
"""

from __future__ import annotations

import re
from decimal import Decimal

NULL_TEXTS = frozenset({"", "~", "null", "Null", "NULL"})
_DIGITS = r"(?:0|[1-9](?:_?[0-9])*)"
_INTEGER = re.compile(rf"[-+]?{_DIGITS}")
_NUMBER = re.compile(rf"[-+]?(?:{_DIGITS}(?:\.(?:[0-9](?:_?[0-9])*)?)?|\.[0-9](?:_?[0-9])*)(?:[eE][-+]?[0-9]{{1,5}})?")
_NOT_FINITE = re.compile(r"[-+]?\.?inf(?:inity)?|\.?nan", re.IGNORECASE)
_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_MAX_DIGITS = 60


def as_integer(text: str) -> int | None:
    """Return the integer that `12`, `1_000`, `1e6` or `1.5e3` means; None for `1.5`, `1.0`, `010` and other text."""
    if len(text) > _MAX_DIGITS:
        return None
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text) and "e" in text.lower():
        value = Decimal(text.replace("_", ""))
        if abs(value.adjusted()) <= _MAX_DIGITS and value == value.to_integral_value():
            return int(value)
    return None


def as_truth(text: str) -> bool | None:
    """Return what true, false, on, off, yes or no means, in lower case, Capitalised or UPPER CASE; None otherwise."""
    return _TRUTHS.get(text.lower()) if text in (text.lower(), text.capitalize(), text.upper()) else None


def as_anything(text: str) -> object:
    """Return null, a truth value, an integer, a number or the text itself, by the core schema of YAML 1.2."""
    if text in NULL_TEXTS:
        return None
    if text.lower() in ("true", "false"):
        return as_truth(text)
    if len(text) <= _MAX_DIGITS and _NUMBER.fullmatch(text):
        return int(text) if _INTEGER.fullmatch(text) else float(text)
    return float(text.replace(".", "")) if _NOT_FINITE.fullmatch(text) else text
