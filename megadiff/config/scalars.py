"""What a typed word means as a number, a truth value or anything: None when it is not one.

PyYAML's own reading (YAML 1.1) is not used, for it takes `3e-4` for text, `010` for 8, `12:30` for 750 and `no` for
false whatever the field is. Here the field's type asks, and only then is the text read.
"""

from __future__ import annotations

import re
from decimal import Decimal

from megadiff.config.tree import Scalar

_DIGITS = r"(?:0|[1-9](?:_?[0-9])*)"
_INTEGER = re.compile(rf"[-+]?{_DIGITS}")
_NUMBER = re.compile(rf"[-+]?(?:{_DIGITS}(?:\.(?:[0-9](?:_?[0-9])*)?)?|\.[0-9](?:_?[0-9])*)(?:[eE][-+]?[0-9]{{1,5}})?")
_NOT_FINITE = re.compile(r"[-+]?\.?inf(?:inity)?|\.?nan", re.IGNORECASE)
_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_LONGEST_NUMBER = 60


def as_integer(text: str) -> int | None:
    """`12`, `1_000`, `1e6`, `1.5e3`; not `1.5`, `1.0`, nor `010` (8 in YAML 1.1, 10 in YAML 1.2)."""
    if len(text) > _LONGEST_NUMBER:
        return None
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text) and "e" in text.lower():
        value = Decimal(text.replace("_", ""))
        if abs(value.adjusted()) <= _LONGEST_NUMBER and value == value.to_integral_value():
            return int(value)
    return None


def is_digits(text: str) -> bool:
    """Whether the text is an integer without point or exponent."""
    return _INTEGER.fullmatch(text) is not None


def as_number(text: str) -> float | None:
    """`3`, `3e-4`, `1e22`, `.5`, `1_000.5`, `.inf`, `.nan`; not `010` nor `12:30`. Bounds are the field's business."""
    if len(text) <= _LONGEST_NUMBER and _NUMBER.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return None


def as_truth(text: str) -> bool | None:
    """true, false, on, off, yes, no: in lower case, Capitalised or UPPER CASE."""
    return _TRUTHS.get(text.lower()) if text in (text.lower(), text.capitalize(), text.upper()) else None


def as_anything(scalar: Scalar) -> object:
    """The value where no type is asked for: null, true/false, integer, number, else text (YAML 1.2's core schema)."""
    if scalar.quoted:
        return scalar.text
    if scalar.is_null:
        return None
    if scalar.text.lower() in ("true", "false"):
        return as_truth(scalar.text)
    if _INTEGER.fullmatch(scalar.text):
        return as_integer(scalar.text)
    number = as_number(scalar.text)
    return scalar.text if number is None else number
