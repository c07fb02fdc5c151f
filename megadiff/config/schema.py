"""Questions about the sections of a configuration: which keys there are, and what a key takes, in words."""

from __future__ import annotations

import collections.abc
import enum
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megadiff.config.nodes import Node
from megadiff.config.registry import Family
from megadiff.config.section import Section
from megadiff.errors import ConfigError

_LISTS = (list, tuple, set, frozenset, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)
_WORDS: dict[object, str] = {
    int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path", type(None): "null"
}  # fmt: skip


def keys_of(section: type[Section]) -> dict[str, FieldInfo]:
    """Return the fields of a section by their names in YAML, which are their aliases where they have one."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def annotation_of(field: FieldInfo) -> Any:
    """Return the annotation of a field, with the family that its section belongs to."""
    families = [extra for extra in field.metadata if isinstance(extra, Family)]
    return Annotated[field.annotation, families[0]] if families else field.annotation


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the annotation alone; `Annotated` is kept for families only."""
    if get_origin(annotation) is Annotated and family_of(annotation) is None:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for inner in get_args(annotation) for kind in alternatives(inner))
    return (annotation,)


def family_of(kind: Any) -> Family | None:
    """Return the family that a section belongs to, or None."""
    extras = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return next((extra for extra in extras if isinstance(extra, Family)), None)


def section_of(kind: Any, node: Node | None = None) -> type[Section] | None:
    """Return the section that an annotation means, or None; for a family, that of the member named in the node."""
    shared = get_args(kind)[0] if (family := family_of(kind)) is not None else kind
    if not (isinstance(shared, type) and issubclass(shared, Section)):
        return None
    if family is None:
        return shared
    name = node.child(family.key) if node is not None else None
    member = name.value if name is not None else shared.model_fields[family.key].default
    try:
        return family.section(shared, member) if isinstance(member, str) else shared
    except ConfigError:
        return shared


def inside(kind: Any, part: object, node: Node | None) -> tuple[Any, ...]:
    """Return the alternatives of a section's key, a list's item or a mapping's value."""
    if (section := section_of(kind, node)) is not None:
        field = keys_of(section).get(str(part))
        return alternatives(annotation_of(field)) if field is not None else ()
    origin, inner = get_origin(kind) or kind, [arg for arg in get_args(kind) if arg is not Ellipsis]
    if origin in _LISTS and isinstance(part, int) and inner:
        return alternatives(inner[min(part, len(inner) - 1)])
    return alternatives(inner[1]) if origin in _MAPPINGS and len(inner) == 2 else ()


def kinds_at(model: type[Section], path: Sequence[object], root: Node) -> tuple[Any, ...]:
    """Return the alternatives of the value at a path, such as `("data", "train", 0)`."""
    kinds: tuple[Any, ...] = (model,)
    node: Node | None = root
    for part in path:
        kinds = tuple(found for kind in kinds for found in inside(kind, part, node))
        node = node.child(part) if node is not None else None
    return kinds


def is_list(kind: Any) -> bool:
    """Return whether an annotation takes a list."""
    return (get_origin(kind) or kind) in _LISTS


def choices(kind: Any) -> tuple[object, ...]:
    """Return the values that a `Literal` or an enumeration allows; nothing for any other type."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return tuple(member.value for member in kind)
    return get_args(kind) if get_origin(kind) is Literal else ()


def wanted(kinds: Sequence[Any]) -> str:
    """Return what alternatives take in words, such as `an integer` or `one of sum, mean or null`."""
    found = list(dict.fromkeys(_wanted(kind) for kind in kinds))
    return " or ".join(sorted(found, key="null".__eq__))


def _wanted(kind: Any) -> str:
    if allowed := choices(kind):
        listed = ", ".join("null" if value is None else str(value) for value in allowed)
        return f"one of {listed}" if len(allowed) > 1 else listed
    origin = get_origin(kind) or kind
    if origin in _LISTS:
        return "a list"
    is_mapping = section_of(kind) is not None or origin in _MAPPINGS
    return "a mapping of keys" if is_mapping else _WORDS.get(kind, "another value")


def dotted_keys(section: type[Section] | Section, above: str = "") -> list[str]:
    """Return every key of the tree below a section, dotted: `name`, `model.layers`, ...

    Keys of a family are those of all members in the package; below a configuration that has been read, instead of its
    class, they are those of the members it names, wherever these come from.
    """
    model = section if isinstance(section, type) else type(section)
    found: list[str] = []
    for name, field in model.model_fields.items():
        key = above + (field.alias or name)
        value = None if isinstance(section, type) else getattr(section, name)
        below = [value] if isinstance(value, Section) else _sections_below(field)
        found += [key, *(inner for each in below for inner in dotted_keys(each, f"{key}."))]
    return list(dict.fromkeys(found))


def _sections_below(field: FieldInfo) -> Iterator[type[Section]]:
    for kind in alternatives(annotation_of(field)):
        if (section := section_of(kind)) is not None:
            yield section
            yield from (member for _, member in members_of(kind))


def members_of(kind: Any) -> list[tuple[str, type[Section]]]:
    """Return the members of the family of a section, and the class of each; nothing if it belongs to none."""
    family = family_of(kind)
    return [] if family is None else list(family.sections(get_args(kind)[0]))
