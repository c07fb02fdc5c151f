"""Field types in the words of an error message, and the few questions asked about an annotation."""

from __future__ import annotations

import collections.abc
import enum
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megadiff.config.section import Section

LISTS = (list, tuple, set, frozenset, collections.abc.Sequence)
MAPPINGS = (dict, collections.abc.Mapping)
_WORDS: dict[object, str] = {
    int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path", type(None): "null"
}  # fmt: skip


def bare(annotation: Any) -> Any:
    """The annotation without `Annotated`'s extras."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the annotation alone."""
    annotation = bare(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for inner in get_args(annotation) for member in members(inner))
    return (annotation,)


def is_section(annotation: Any) -> bool:
    """Whether the type is a part of the configuration tree."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def choices(annotation: Any) -> tuple[object, ...] | None:
    """The values a `Literal` or an enumeration allows; None for any other type."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return tuple(member.value for member in annotation)
    return None


def wanted(*kinds: Any) -> str:
    """What a field of this type, or of these alternatives, takes: `an integer`, `one of sum, mean or null`."""
    parts: list[str] = []
    for member in (member for kind in kinds for member in members(kind)):
        allowed = choices(member)
        if allowed is not None:
            listed = ", ".join("null" if value is None else str(value) for value in allowed)
            words = f"one of {listed}" if len(allowed) > 1 else listed
        elif (get_origin(member) or member) in LISTS:
            words = "a list"
        elif is_section(member) or (get_origin(member) or member) in MAPPINGS:
            words = "a mapping of keys"
        else:
            words = _WORDS.get(member, "another value")
        if words not in parts:
            parts.append(words)
    if "null" in parts:
        parts = [*(words for words in parts if words != "null"), "null"]
    return " or ".join(parts)


def key_of(name: str, field: FieldInfo) -> str:
    """What a field is called in YAML: its alias (`async`, which Python cannot spell) or its name."""
    return field.alias or name


def keys_of(model: type[Section]) -> dict[str, FieldInfo]:
    """A section's keys in the order of its fields."""
    return {key_of(name, field): field for name, field in model.model_fields.items()}


def default_section(field: FieldInfo) -> type[Section] | None:
    """The section an absent key stands for when it must be built from nothing; None when the field brings its own."""
    annotation = bare(field.annotation)
    if is_section(annotation) and (field.is_required() or field.default_factory is annotation):
        return annotation
    return None


def dotted_keys(model: type[Section], above: str = "") -> list[str]:
    """Every key of the tree below `model`, dotted: `name`, `model.layers`, ..."""
    found: list[str] = []
    for key, field in keys_of(model).items():
        found.append(above + key)
        for member in members(field.annotation):
            if is_section(member):
                found += dotted_keys(member, f"{above}{key}.")
    return found


def is_plain(kind: Any) -> bool:
    """Whether the type is read from one word: a number, a truth value, text, null or a choice."""
    return kind in _WORDS or choices(kind) is not None


def takes_text(alternatives: tuple[Any, ...]) -> bool:
    """Whether any text at all will do."""
    return str in alternatives or Path in alternatives


def width(kind: Any) -> int:
    """A union's alternatives are tried from the narrowest type to the widest: null, a choice, truth, integer, ..."""
    if kind is type(None):
        return 0
    if choices(kind) is not None:
        return 1
    order = {bool: 2, int: 3, float: 4, str: 8, Path: 7, Any: 9, object: 9}
    return order.get(kind, 5)
