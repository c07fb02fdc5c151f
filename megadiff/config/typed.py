"""Tree -> typed configuration: each value is read as its field's type wants it, and every mistake becomes a sentence.

Sections are built from the leaves up, each by its own pydantic model, so that an error's place is known exactly and a
validator only ever sees a section whose own values are good.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BeforeValidator, PlainValidator, ValidationError, WrapValidator
from pydantic.fields import FieldInfo

from megadiff.config import field_types, other_names, refusals, scalars
from megadiff.config.command_line import similar_key
from megadiff.config.section import Section
from megadiff.config.tree import Entry, Group, Items, Scalar, Tree, found
from megadiff.errors import ConfigError


class _Bad:
    """Stands for a value already complained about; no pydantic type accepts it, so nothing is built upon it."""


BAD = _Bad()

_MOST_SUGGESTIONS = 6
"""Number of keys of one foreign section that a sentence translates at most."""


class Reader:
    """Reads a tree as `root` and gathers what is wrong with it in `problems`, one sentence each."""

    def __init__(self, root: type[Section]) -> None:
        self.root = root
        self.problems: list[str] = []

    def section(self, model: type[Section], group: Group, key: str) -> Section | _Bad:
        """Build one section; `key` is its dotted name, empty for the root."""
        fields = field_types.keys_of(model)
        values: dict[str, object] = {}
        known_before = len(self.problems)
        for name, entry in group.entries.items():
            if name not in fields:
                self._unknown(name, entry, key, fields)
                continue
            values[name] = self._field(model, name, fields[name], entry.tree, _join(key, name))
        for name, field in fields.items():
            inner = field_types.default_section(field)
            if name not in values and inner is not None:
                values[name] = self.section(inner, Group({}, group.place), _join(key, name))
        bad = {name for name, value in values.items() if value is BAD}
        if bad and _has_early_validators(model):
            return BAD  # a validator that runs before types are checked must not meet a bad value
        try:
            built = model.model_validate(values)
        except ValidationError as error:
            self.problems += refusals.sentences(error, group, key, model, skip=bad)
            return BAD
        except ConfigError as error:
            self.problems.append(refusals.at(group, key, str(error)))
            return BAD
        return built if len(self.problems) == known_before else BAD

    def value(self, tree: Tree, annotation: Any, key: str) -> object:
        """The tree as a value of the annotated type, or BAD once the problem is noted."""
        kind, *others = field_types.members(annotation)
        if others:
            return self._union(tree, (kind, *others), key)
        origin = get_origin(kind) or kind
        if field_types.is_section(kind):
            return self._group_or_shorthand(tree, kind, key)
        if origin in field_types.LISTS:
            return self._items(tree, kind, key) if isinstance(tree, Items) else self._wrong(tree, kind, key)
        if origin in field_types.MAPPINGS:
            return self._mapping(tree, kind, key) if isinstance(tree, Group) else self._wrong(tree, kind, key)
        if isinstance(tree, Scalar):
            value = _scalar(tree, kind)
            return self._wrong(tree, kind, key) if value is BAD else value
        return self._wrong(tree, kind, key) if field_types.is_plain(kind) else untyped(tree)

    def _field(self, model: type[Section], name: str, field: FieldInfo, tree: Tree, key: str) -> object:
        known = len(self.problems)
        value = self.value(tree, field.annotation, key)
        is_taken_back = isinstance(tree, Scalar) and tree.is_null and _has_early_model_validators(model)
        if value is BAD and (is_taken_back or _is_read_early(model, name, field)):
            del self.problems[known:]  # the field's own validator may take what its type does not
            return untyped(tree)
        return value

    def _group_or_shorthand(self, tree: Tree, kind: type[Section], key: str) -> object:
        """A mapping, or the one word some sections take in its place through a validator that runs first."""
        if isinstance(tree, Scalar) and tree.is_null:
            tree = Group({}, tree.place)
        if isinstance(tree, Group):
            return self.section(kind, tree, key)
        if isinstance(tree, Scalar) and _has_early_validators(kind):
            try:
                return kind.model_validate(tree.text)
            except ValidationError:
                return self._wrong(tree, kind, key)
        return self._wrong(tree, kind, key)

    def _union(self, tree: Tree, alternatives: tuple[Any, ...], key: str) -> object:
        """The first alternative that takes the value, from the narrowest to the widest."""
        tried: list[list[str]] = []
        outer, self.problems = self.problems, []
        try:
            for kind in sorted(alternatives, key=field_types.width):
                if (
                    kind is int
                    and float in alternatives
                    and isinstance(tree, Scalar)
                    and not scalars.is_digits(tree.text)
                ):
                    continue  # beside a float, `1e6` is one: what is dumped must load back as it was
                self.problems = []
                value = self.value(tree, kind, key)
                if value is not BAD:
                    return value
                if field_types.is_section(kind) and isinstance(tree, Group):
                    tried.append(self.problems)
        finally:
            self.problems = outer
        if tried:  # several kinds of section: complain as the one that came closest would
            self.problems += min(tried, key=len)
            return BAD
        return self._wrong(tree, alternatives, key)

    def _items(self, tree: Items, kind: Any, key: str) -> object:
        types = [inner for inner in get_args(kind) if inner is not Ellipsis] or [Any]
        same = len(types) == 1
        if not same and len(types) != len(tree.items):
            self.problems.append(f"{tree.place}: `{key}` wants {len(types)} items, found {len(tree.items)}")
            return BAD
        values = [self.value(item, types[0 if same else i], f"{key}.{i}") for i, item in enumerate(tree.items)]
        return BAD if BAD in values else values

    def _mapping(self, tree: Group, kind: Any, key: str) -> object:
        inner = (get_args(kind) or (str, Any))[1]
        values = {name: self.value(entry.tree, inner, _join(key, name)) for name, entry in tree.entries.items()}
        return BAD if BAD in values.values() else values

    def _wrong(self, tree: Tree, kind: Any, key: str) -> _Bad:
        alternatives = kind if isinstance(kind, tuple) else (kind,)
        words = field_types.wanted(*alternatives)
        hint = ""
        if isinstance(tree, Scalar):
            texts = [str(c) for member in alternatives for c in field_types.choices(member) or () if c is not None]
            hint = refusals.did_you_mean(tree.text, texts)
            if not hint and field_types.takes_text(alternatives) and tree.is_null and tree.text:
                hint = f"; put it in quotes to mean the text {tree.text}"
        self.problems.append(f"{tree.place}: `{key}` wants {words}, found {found(tree)}{hint}")
        return BAD

    def _unknown(self, name: str, entry: Entry, key: str, keys: Iterable[str]) -> None:
        """Note a key that the section does not have, with the key or keys that were probably meant."""
        full = _join(key, name)
        meant = self._meant(name, entry, full, list(keys))
        self.problems.append(f"{entry.place}: unknown key `{full}`{meant}keys here: {', '.join(keys)}")

    def _meant(self, name: str, entry: Entry, full: str, keys: list[str]) -> str:
        """Return what is said between an unknown key and the keys of its section."""
        if isinstance(entry.tree, Group) and (inner := self._meant_inside(entry.tree, full)):
            return f"; {inner} "
        if (answer := other_names.answer_elsewhere(full)) is not None:
            return f": {answer}; "
        elsewhere = [path for path in field_types.dotted_keys(self.root) if path.split(".")[-1] == name]
        if len(elsewhere) == 1:  # the right name on the wrong level
            return f"; did you mean `{elsewhere[0]}`? "
        if other_names.key_elsewhere(full) is None and (near := refusals.did_you_mean(name, keys)):
            return f"{near} "
        similar = similar_key(full, self.root)
        return f"; did you mean `{similar}`? " if similar is not None else "; "

    def _meant_inside(self, group: Group, full: str) -> str:
        """Return the keys here of what stands in a section that another trainer has, such as `training:`."""
        known = field_types.dotted_keys(self.root)
        sections = difflib.get_close_matches(full, known, n=1, cutoff=0.6)
        if sections and all(f"{sections[0]}.{name}" in known for name in group.entries):
            return f"did you mean `{sections[0]}`?"
        pairs = [(f"{full}.{name}", similar_key(f"{full}.{name}", self.root)) for name in group.entries]
        meant = [f"`{theirs}` is `{ours}` here" for theirs, ours in pairs if ours is not None]
        return ", ".join(meant[:_MOST_SUGGESTIONS]) + ";" * bool(meant)


def untyped(tree: Tree) -> Any:
    """The tree as plain Python values, for a field that takes anything."""
    if isinstance(tree, Group):
        return {name: untyped(entry.tree) for name, entry in tree.entries.items()}
    if isinstance(tree, Items):
        return [untyped(item) for item in tree.items]
    return scalars.as_anything(tree)


def _scalar(scalar: Scalar, kind: Any) -> object:
    """One word read as one type, or BAD; what is in quotes is text and nothing else."""
    allowed = field_types.choices(kind)
    if allowed is not None:
        match = next((value for value in allowed if _is_choice(scalar, value)), BAD)
        return kind(match) if match is not BAD and isinstance(kind, type) and issubclass(kind, enum.Enum) else match
    if kind in (Any, object):
        return scalars.as_anything(scalar)
    if kind is type(None):
        return None if scalar.is_null else BAD
    if kind in (str, Path):
        return BAD if scalar.is_null else kind(scalar.text)
    readers = {int: scalars.as_integer, float: scalars.as_number, bool: scalars.as_truth}
    if kind not in readers:
        return scalars.as_anything(scalar)  # a type of its own: pydantic decides
    value = None if scalar.quoted else readers[kind](scalar.text)
    return BAD if value is None else value


def _is_choice(scalar: Scalar, value: object) -> bool:
    if isinstance(value, str):
        return scalar.text == value
    return value == _scalar(scalar, type(value)) and not isinstance(value, _Bad)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _has_early_model_validators(model: type[Section]) -> bool:
    """Whether a validator sees the section's values before their types are checked; it may take null back."""
    return any(d.info.mode != "after" for d in model.__pydantic_decorators__.model_validators.values())


def _has_early_validators(model: type[Section]) -> bool:
    return _has_early_model_validators(model) or any(
        _is_read_early(model, field_types.key_of(name, field), field) for name, field in model.model_fields.items()
    )


def _is_read_early(model: type[Section], key: str, field: FieldInfo) -> bool:
    """Whether a validator of the field's own runs before its type is checked."""
    if any(isinstance(extra, (BeforeValidator, PlainValidator, WrapValidator)) for extra in field.metadata):
        return True
    names = {name for name, other in model.model_fields.items() if field_types.key_of(name, other) == key}
    return any(
        decorator.info.mode != "after" and (names & set(decorator.info.fields) or "*" in decorator.info.fields)
        for decorator in model.__pydantic_decorators__.field_validators.values()
    )
