"""Extraction of the text from one JSON line, as leniently as Python's own `json` module.

`orjson` is several times faster and reads nearly every line; what it refuses but Python or pandas write (NaN, Infinity,
numbers beyond a double, halves of surrogate pairs) is read by `json`. The result is the same in both cases, and also if
`orjson` is not installed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from megadiff.data.corpus_lines import Line, TopLevel

try:
    import orjson
except ImportError:  # pragma: no cover - tests set the name to None instead
    orjson = None

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_SHOWN_KEYS = 8
_PLAIN = json.JSONDecoder(parse_int=lambda digits: 0, parse_float=lambda digits: 0.0)


@dataclass(frozen=True)
class Bad:
    """The reason why a line has no usable text, and a remedy."""

    reason: str
    remedy: str = "correct the line"


@dataclass(frozen=True)
class Text:
    """The text of a line."""

    text: str
    is_repaired: bool = False
    """Whether halves of surrogate pairs, which are not characters, were replaced by U+FFFD."""


def text_of(line: Line, key: str) -> Text | Bad:
    """Return the string under `key` of a JSON object.

    Args:
        line: a line with content, without a byte-order mark.
        key: name of the string; if an object has several, the last one counts, as in Python.
    """
    content = line.content
    assert content is not None
    found = parse_json_line(content)
    if isinstance(found, NotJson):
        return invalid_utf8(content, of="line", is_whole=line.num_bytes == len(content)) or Bad(
            f"not a JSON object ({found.why})"
        )
    if not isinstance(found, dict):
        hint = "; write one object a line (in pandas: orient='records', lines=True)" if isinstance(found, list) else ""
        return Bad(f"wanted a JSON object with the key `{key}`, found {json_kind(found)}{hint}")
    if key not in found:
        keys = ", ".join(shown(name) for name in list(found)[:_MAX_SHOWN_KEYS]) or "none"
        return Bad(f"no key `{key}` (keys here: {keys}; choose with --json-key)")
    text = found[key]
    if not isinstance(text, str):
        return Bad(f"`{key}` must be a string, found {json_kind(text)}")
    whole = without_lone_surrogates(text)
    return Text(whole, is_repaired=whole != text)


def without_lone_surrogates(text: str) -> str:
    """Return the text with U+FFFD in place of halves of surrogate pairs, which no encoding can represent."""
    return text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text)


def invalid_utf8(content: bytes, *, of: str, is_whole: bool = True, offset: int = 0) -> Bad | None:
    """Return the first byte that is not UTF-8, as a bad line; None if there is none.

    Args:
        of: the unit in which bytes are counted, such as `line`.
        is_whole: whether `content` is the complete unit, so that positions in it are meaningful to a reader.
        offset: position of the first byte of `content`.
    """
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f" at byte {offset + error.start} of the {of}" if is_whole else ""
        value = f"0x{content[error.start]:02x}"
        encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        return Bad(
            f"invalid UTF-8{place} ({value})",
            f"convert the file (for example iconv -f {encoding} -t utf-8 OLD > NEW)",
        )
    return None


def shown(key: str) -> str:
    """Return a key in a form that fits a message, whatever a corpus contains."""
    return key if key.isprintable() and len(key) <= 40 else f"{key[:40]!r}"


def json_kind(value: Any) -> str:
    """Return the name of a JSON value's kind, for messages."""
    kinds = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "an object")


@dataclass(frozen=True)
class NotJson:
    """The reason why a line is not JSON."""

    why: str


def parse_json_line(content: bytes) -> Any:
    """Return the value of a line as Python and pandas write it, `NaN` and `Infinity` included, or a `NotJson`."""
    if orjson is not None:
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError:
            pass
    try:
        return _PLAIN.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return NotJson(f"invalid UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return NotJson(f"{error.msg} at character {error.pos}")
    except RecursionError:
        return _flattened(content)


def _flattened(content: bytes) -> Any:
    """Read a line that nests too deeply, without its nested values; text is never below the top level."""
    reduced = TopLevel()(content)
    if reduced == content:
        return NotJson("nested too deeply")
    try:
        return _PLAIN.decode(reduced.decode("utf-8"))
    except (ValueError, RecursionError):
        return NotJson("nested too deeply")
