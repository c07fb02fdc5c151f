"""YAML files as trees of nodes with positions, and the numbers and words of the command line.

PyYAML's own rules (YAML 1.1) are not used: they read `3e-4` as text, `010` as 8, `12:30` as 750 and `no` as false.

PyYAML composes the nodes. Refused here are tags, merge keys, keys given twice, and text whose aliases, size or depth
could exhaust memory, before anything is built from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import yaml
from yaml import events

from megadiff.errors import ConfigError, shown

NULL_TEXTS = frozenset({"", "~", "null", "Null", "NULL"})
_DIGITS = r"(?:0|[1-9](?:_?[0-9])*)"
_INTEGER = re.compile(rf"[-+]?{_DIGITS}")
_NUMBER = re.compile(rf"[-+]?(?:{_DIGITS}(?:\.(?:[0-9](?:_?[0-9])*)?)?|\.[0-9](?:_?[0-9])*)(?:[eE][-+]?[0-9]{{1,5}})?")
_NOT_FINITE = re.compile(r"[-+]?\.?inf(?:inity)?|\.?nan", re.IGNORECASE)
_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_MAX_DIGITS = 60

MAX_NODES = 50_000
"""Largest number of values in a file once its aliases are written out; a run description has a few hundred."""

MAX_DEPTH = 40
"""Deepest nesting of values."""

MAX_CHARACTERS = 1_000_000
"""Longest text that is given to the parser."""


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


@dataclass(frozen=True)
class Place:
    """File and, where it is known, line (from 1) of something written."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


COMMAND_LINE = Place("command line")


@dataclass(frozen=True)
class Node:
    """A word, a list or a mapping as it was written; a mapping's values have the place of their keys."""

    value: str | list[Node] | dict[str, Node]
    place: Place
    is_quoted: bool = False
    takes_back: bool = False
    """Whether this is a null in the place of a value that a file below gave."""

    @property
    def is_null(self) -> bool:
        """Whether this is an empty value, `~` or `null`, without quotes."""
        return not self.is_quoted and isinstance(self.value, str) and self.value in NULL_TEXTS

    def child(self, part: object) -> Node | None:
        """Return the value under a key or the item of an index, or None if there is none."""
        if isinstance(self.value, dict):
            return self.value.get(str(part))
        has_item = isinstance(self.value, list) and isinstance(part, int) and part < len(self.value)
        return self.value[part] if has_item else None  # type: ignore[index]

    def places(self) -> Iterator[Place]:
        """Yield the place of every word, list and empty mapping in this node."""
        if not (isinstance(self.value, dict) and self.value):
            yield self.place
        else:
            for node in self.value.values():
                yield from node.places()

    def __str__(self) -> str:
        """Return the node as a message quotes it."""
        if not isinstance(self.value, str):
            return "a mapping" if isinstance(self.value, dict) else "a list"
        if self.is_null:
            return "nothing (null)"
        text = self.value if len(self.value) <= 60 else self.value[:57] + "..."
        return f"the quoted text {text!r}" if self.is_quoted else f"`{text}`"


def merge(under: Node | None, over: Node) -> Node:
    """Lay `over` upon `under`: mappings are merged key by key at every depth, anything else is replaced."""
    if under is not None and over.is_null:
        return replace(over, takes_back=True)
    if under is None or not (isinstance(under.value, dict) and isinstance(over.value, dict)):
        return over
    merged = {key: merge(under.value.get(key), node) for key, node in over.value.items()}
    return Node({**under.value, **merged}, under.place if over.place == COMMAND_LINE else over.place)


def parse_yaml(text: str, source: Place) -> Node | None:
    """Read one YAML document; None if it is empty.

    Args:
        text: the document.
        source: its file, or the command line, whose values get no line numbers.

    Raises:
        ConfigError: bad syntax, a key given twice, a tag, more than one document, or too long, too deep or too many
            values.
    """
    if len(text) > MAX_CHARACTERS:
        found = f"{len(text)} characters where at most {MAX_CHARACTERS} are wanted"
        raise ConfigError(f"{source}: {found}, so it is hardly a run description; give the run's own file")
    try:
        composer = _Composer(text, source)
        node = composer.get_single_node()
        return None if node is None else composer.converted(node, place=_place(source, node.start_mark))
    except yaml.MarkedYAMLError as error:
        why = ", ".join(part for part in (error.context, error.problem) if part)
        why += "; indent with spaces" if "'\\t'" in why else ""
        raise ConfigError(
            f"{_place(source, error.problem_mark or error.context_mark)}: not valid YAML: {why}"
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        place = source if source == COMMAND_LINE else Place(source.source, line)
        character = chr(error.character) if isinstance(error.character, int) else error.character
        raise ConfigError(f"{place}: not valid YAML: the control character {character!r}") from None


class _Composer(yaml.SafeLoader):
    """PyYAML's composer with limits; in pure Python, for libyaml words its errors differently and can overflow."""

    def __init__(self, text: str, source: Place) -> None:
        super().__init__(text)
        self._source = source
        self._sizes: dict[str, int] = {}
        self._count = self._depth = 0

    def resolve(self, *_: Any) -> str:  # types of words are decided by the schema, not by YAML
        return ""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        self._check(event)
        is_alias = isinstance(event, events.AliasEvent)
        before = self._count
        self._count += self._sizes[event.anchor] if is_alias else 1
        if self._count > MAX_NODES:
            self._refuse(event, f"more than {MAX_NODES} values once aliases are written out")
        if not is_alias:  # an anchor may be given again, and is known only once its value is complete
            self.anchors.pop(event.anchor, None)
            self._sizes.pop(event.anchor, None)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None and not is_alias:
            self._sizes[event.anchor] = self._count - before
        return node

    def converted(self, node: Any, *, place: Place) -> Node:
        """Return a node of PyYAML's as one of ours, at `place`; items of a list are at their own lines."""
        if isinstance(node, yaml.ScalarNode):
            return Node(node.value, place, is_quoted=node.style is not None)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.converted(item, place=_place(place, item.start_mark)) for item in node.value], place)
        entries: dict[str, Node] = {}
        for key, value in node.value:
            at = _place(place, key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{at}: a key must be a word, found {self.converted(key, place=at)}")
            if key.value == "<<" and key.style is None:
                raise ConfigError(f"{at}: merge keys (`<<`) are not supported; put what is shared into a `base:` file")
            if (first := entries.get(key.value)) is not None:
                where = f", first on line {first.place.line}" if first.place.line is not None else ""
                raise ConfigError(f"{at}: the key `{_clipped(key.value)}` is given twice{where}")
            entries[key.value] = self.converted(value, place=at)
        return Node(entries, place)

    def _check(self, event: Any) -> None:
        """Refuse tags, unknown aliases, too deep nesting, and characters that no file's name or text can hold."""
        if isinstance(event, events.AliasEvent):
            if event.anchor not in self._sizes:
                self._refuse(event, f"the alias `*{_clipped(event.anchor or '')}` names no anchor defined above it")
            return
        if event.tag is not None:
            tag = _clipped(event.tag.replace("tag:yaml.org,2002:", "!!"))
            self._refuse(event, f"the tag `{tag}` is not allowed; write a plain value")
        if self._depth > MAX_DEPTH:
            self._refuse(event, f"values are nested deeper than {MAX_DEPTH} levels")
        text = event.value if isinstance(event, events.ScalarEvent) else ""
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
            what = "a NUL character" if "\0" in text else "half of a surrogate pair"
            self._refuse(event, f"{shown(text)} holds {what}, which no setting may; remove it")

    def _refuse(self, event: events.Event, reason: str) -> None:
        raise ConfigError(f"{_place(self._source, event.start_mark)}: {reason}")


def _place(source: Place, mark: Any) -> Place:
    return source if source == COMMAND_LINE or mark is None else Place(source.source, mark.line + 1)


def _clipped(name: str) -> str:
    return name if len(name) <= 80 else name[:80] + "..."
