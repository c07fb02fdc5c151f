"""A tree of nodes as a typed, frozen configuration: pydantic decides on every type and bound.

Validation is strict, so that `true` is no number and `'3'` in quotes no integer. A word is first taken for what it
looks like, and read as another type only where pydantic has refused that: `1e6` looks like a number and `no` like
text, but an integer field takes the first as 1,000,000, a truth value the second as false, and a text field either as
it was typed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from megadiff.config import messages, scalars, schema
from megadiff.config.nodes import Node
from megadiff.config.section import Section
from megadiff.errors import ConfigError

T = TypeVar("T", bound=Section)


def validated(tree: Node, model: type[T]) -> T:
    """Return the tree as `model`.

    Raises:
        ConfigError: all mistakes found, a line each.
    """
    readings: dict[tuple[int | str, ...], Callable[[Any], Any]] = {}
    tried: set[tuple[Any, ...]] = set()
    while True:
        try:
            return model.model_validate(_values(tree, readings), strict=True, context={"strict": True})
        except ValidationError as error:
            mistakes = messages.located(error.errors(include_url=False), tree)
        broken = {m.path for m in mistakes if not m.is_about_type}  # of a right type for one alternative of a union
        untried = [m for m in mistakes if (m.path, m.detail["type"]) not in tried]
        tried |= {(m.path, m.detail["type"]) for m in untried}
        found = {
            m.path: reading
            for m in untried
            if not (m.detail["type"] == "literal_error" and m.path in broken)
            if (reading := _reading(m, tree, model)) is not None
        }
        is_filled = any([_filled(m, tree, model) for m in untried])
        if not found and not is_filled:
            raise ConfigError("\n".join(messages.sentences(mistakes, tree, model)))
        readings |= found


def _filled(mistake: messages.Mistake, tree: Node, model: type[Section]) -> bool:
    """Put an empty mapping in the place of a missing section, whose own keys are then found missing or good."""
    kinds = schema.kinds_at(model, mistake.path, tree)
    if mistake.node is not None or mistake.alternative is not None or not isinstance(mistake.parent.value, dict):
        return False
    is_section = len(kinds) == 1 and schema.section_of(kinds[0]) is not None
    if is_section:
        mistake.parent.value[str(mistake.path[-1])] = Node({}, mistake.parent.place)
    return is_section


def _values(node: Node, readings: Mapping[Any, Callable[[Any], Any]], path: tuple[int | str, ...] = ()) -> Any:
    """Return plain Python values, each read as the readings have it."""
    if isinstance(node.value, dict):
        return {key: _values(inner, readings, (*path, key)) for key, inner in node.value.items()}
    if isinstance(node.value, list):
        found: Any = [_values(inner, readings, (*path, index)) for index, inner in enumerate(node.value)]
    else:
        found = node.value if node.is_quoted else scalars.as_anything(node.value)
    return readings[path](found) if path in readings else found


def _reading(mistake: messages.Mistake, tree: Node, model: type[Section]) -> Callable[[Any], Any] | None:
    """Return how to read a value that pydantic refused as the type that it wants, or None if it cannot be."""
    kind, node = mistake.detail["type"], mistake.node
    if node is None or isinstance(node.value, dict):
        return None
    if isinstance(node.value, list):
        return {"tuple_type": tuple, "set_type": set, "frozen_set_type": frozenset}.get(kind)
    value: Any = None
    if kind == "model_type" and node.is_null:
        value = {}
    elif node.is_null:
        return None
    elif kind in ("string_type", "literal_error", "model_type"):
        value = node.value
    elif kind == "int_type" and not node.is_quoted:
        value = scalars.as_integer(node.value)
    elif kind == "bool_type" and not node.is_quoted:
        value = scalars.as_truth(node.value)
    elif kind == "is_instance_of":  # a path, or a member of an enumeration
        value = _instance(node.value, schema.kinds_at(model, mistake.path, tree))
    return None if value is None else lambda _: value


def _instance(text: str, kinds: Sequence[Any]) -> Any:
    for kind in kinds:
        with contextlib.suppress(ValidationError):
            return TypeAdapter(kind).validate_python(text)
    return None
