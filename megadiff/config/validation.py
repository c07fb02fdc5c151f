"""A tree of nodes as a typed, frozen configuration: pydantic decides on every type and bound.

Validation is strict, so that `true` is no number and `'3'` in quotes no integer. A word is first taken for what it
looks like, and read as another type only where pydantic has refused that: `1e6` looks like a number and `no` like
text, but an integer field takes the first as 1,000,000, a truth value the second as false, and a text field either as
it was typed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from megadiff.config import messages, scalars, schema
from megadiff.config.messages import Mistake, Path
from megadiff.config.nodes import Node
from megadiff.config.section import Section
from megadiff.errors import ConfigError

T = TypeVar("T", bound=Section)

_TEXT = ("string_type", "literal_error", "model_type")
"""Errors that the text as it was typed may answer; of a section, one that a single word can be written for."""


class Reading(NamedTuple):
    """Reading of a value other than the one its looks suggest."""

    kind: str
    """Pydantic's error that called for it."""
    convert: Callable[[Any], Any]
    """Function of the value that it looks like."""


Readings = dict[Path, Reading]


def validated(tree: Node, model: type[T]) -> T:
    """Return the tree as `model`.

    Raises:
        ConfigError: all mistakes found, a line each.
    """
    readings: Readings = {}
    tried: list[set[tuple[Path, str]]] = []
    while True:
        try:
            return model.model_validate(_values(tree, readings), strict=True, context={"strict": True})
        except ValidationError as error:
            mistakes = messages.located(error.errors(include_url=False), tree)
        is_filled = any([_filled(mistake, tree, model) for mistake in mistakes])
        tried.append({(path, reading.kind) for path, reading in readings.items()})
        readings |= _readings(mistakes, readings, tree, model)
        if not is_filled and {(path, reading.kind) for path, reading in readings.items()} in tried:
            raise ConfigError("\n".join(messages.sentences(mistakes, tree, model)))


def _readings(mistakes: Sequence[Mistake], so_far: Readings, tree: Node, model: type[Section]) -> Readings:
    """Return other readings of the values that have one; as text only where no value has any other."""
    broken = {m.path for m in mistakes if not m.is_about_type}  # of the right type for one alternative of a union
    found: Readings = {}
    for mistake in sorted(mistakes, key=lambda mistake: mistake.kind in _TEXT):
        if mistake.kind in _TEXT and any(reading.kind not in _TEXT for reading in found.values()):
            break
        is_read = mistake.path in so_far and so_far[mistake.path].kind == mistake.kind
        if is_read or (mistake.kind == "literal_error" and mistake.path in broken):
            continue
        if (convert := _conversion(mistake, tree, model)) is not None:
            found[mistake.path] = Reading(mistake.kind, convert)
    return found


def _filled(mistake: Mistake, tree: Node, model: type[Section]) -> bool:
    """Put an empty mapping in the place of a missing section, whose own keys are then found missing or good."""
    kinds = schema.kinds_at(model, mistake.path, tree)
    if mistake.node is not None or mistake.alternative is not None or not isinstance(mistake.parent.value, dict):
        return False
    is_section = len(kinds) == 1 and schema.section_of(kinds[0]) is not None
    if is_section:
        mistake.parent.value[str(mistake.path[-1])] = Node({}, mistake.parent.place)
    return is_section


def _values(node: Node, readings: Readings, path: Path = ()) -> Any:
    """Return plain Python values, each read as the readings have it."""
    if isinstance(node.value, dict):
        return {key: _values(inner, readings, (*path, key)) for key, inner in node.value.items()}
    if isinstance(node.value, list):
        found: Any = [_values(inner, readings, (*path, index)) for index, inner in enumerate(node.value)]
    else:
        found = node.value if node.is_quoted else scalars.as_anything(node.value)
    return readings[path].convert(found) if path in readings else found


def _conversion(mistake: Mistake, tree: Node, model: type[Section]) -> Callable[[Any], Any] | None:
    """Return the function that makes a refused value one of the type that is wanted, or None if there is none."""
    kind, node = mistake.kind, mistake.node
    value: Any = None
    if node is None or isinstance(node.value, dict) or (node.is_null and kind != "model_type"):
        return None
    if kind == "tuple_type" and isinstance(node.value, list):
        return tuple
    if kind in ("set_type", "frozen_set_type", "is_instance_of"):  # also paths and members of enumerations
        words = [item.value for item in node.value] if isinstance(node.value, list) else node.value
        value = _instance(words, schema.kinds_at(model, mistake.path, tree))
    elif isinstance(node.value, str):
        if kind in _TEXT:
            value = {} if node.is_null else node.value
        elif kind in ("int_type", "bool_type") and not node.is_quoted:
            value = scalars.as_integer(node.value) if kind == "int_type" else scalars.as_truth(node.value)
    return None if value is None else lambda _: value


def _instance(words: Any, kinds: Sequence[Any]) -> Any:
    for kind in kinds:
        with contextlib.suppress(ValidationError):
            return TypeAdapter(kind).validate_python(words)
    return None
