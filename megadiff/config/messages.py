"""One sentence for each mistake in a run description: where, what was wanted, what was found, what to do.

Validation is strict, so that `true` is no number and `'3'` in quotes no integer. A word is first taken for what it
looks like, and read as another type only where pydantic has refused that: `1e6` looks like a number and `no` like
text, but an integer field takes the first as 1,000,000, a truth value the second as false, and a text field either as
it was typed.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from megadiff.config import nodes, schema, suggestions
from megadiff.config.command_line import similar_key
from megadiff.config.nodes import COMMAND_LINE, Node, Place
from megadiff.config.section import Section
from megadiff.config.suggestions import did_you_mean
from megadiff.errors import ConfigError

_RULE = re.compile(r"(?:Input|List|Tuple|String|Dictionary) should (.*?)(?: after validation, not \d+)?")
"""Pydantic's wording of a bound; what follows `should` reads well after `must`."""

_MAX_SUGGESTIONS = 6
"""Largest number of keys of another trainer's section that a sentence translates."""


KeyPath = tuple[int | str, ...]
"""Keys and indices from the root of the tree."""

T = TypeVar("T", bound=Section)

_TEXT = ("string_type", "literal_error", "model_type")
"""Errors that the text as it was typed may answer; of a section, one that a single word can be written for."""


@dataclass(frozen=True)
class Mistake:
    """One of pydantic's errors with its place in the tree."""

    detail: Any
    """Entry of `ValidationError.errors()`."""
    path: KeyPath
    """Place of the value, without pydantic's names of alternatives."""
    node: Node | None
    """Value at the path; None for a missing key."""
    parent: Node
    """Innermost value that exists on the way to it."""
    alternative: tuple[int, str] | None
    """Depth and name of the alternative of a union that was tried; None outside unions."""

    @property
    def kind(self) -> str:
        """Pydantic's name of the error, such as `int_type`."""
        return self.detail["type"]

    @property
    def is_about_type(self) -> bool:
        """Whether the value has another type than the field, not one that breaks a rule."""
        return self.kind.endswith(("_type", "_parsing")) or self.kind in ("literal_error", "enum", "is_instance_of")

    @property
    def key(self) -> str:
        """Dotted key, such as `data.train.0.path`."""
        return ".".join(map(str, self.path))


def located(errors: Sequence[Any], root: Node) -> list[Mistake]:
    """Return pydantic's errors with their places in the tree."""
    return [_located(detail, root) for detail in errors]


def sentences(mistakes: Sequence[Mistake], root: Node, model: type[Section]) -> list[str]:
    """Return one sentence for each value that is wrong, files first, in the order of their lines."""
    by_path: dict[KeyPath, Mistake] = {}
    for mistake in _of_closest_alternatives(mistakes):
        is_effect = mistake.kind == "too_short" and any(_is_below(other, mistake) for other in mistakes)
        if not is_effect and (mistake.path not in by_path or by_path[mistake.path].is_about_type):
            by_path[mistake.path] = mistake
    found = [((m.node or m.parent).place, _sentence(m, root, model)) for m in by_path.values()]
    found.sort(key=lambda pair: (pair[0] == COMMAND_LINE, pair[0].source, pair[0].line or 0))
    return [sentence for _, sentence in found]


def _is_below(mistake: Mistake, other: Mistake) -> bool:
    """Return whether a mistake is about an item of what another one is about."""
    return len(mistake.path) > len(other.path) and mistake.path[: len(other.path)] == other.path


def _located(detail: Any, root: Node) -> Mistake:
    node, path, alternative = root, [], None
    for depth, part in enumerate(detail["loc"]):
        inner = node.child(part)
        if inner is not None:
            node = inner
            path.append(part)
        elif detail["type"] == "missing" and depth == len(detail["loc"]) - 1:
            return Mistake(detail, (*path, part), None, node, alternative)
        elif alternative is None:
            alternative = (len(path), str(part))
    return Mistake(detail, tuple(path), node, node, alternative)


def _of_closest_alternatives(mistakes: Sequence[Mistake]) -> list[Mistake]:
    """Keep of each union the mistakes of one alternative: the fewest, and rather of a rule than of a type."""
    unions: dict[tuple[Any, ...], dict[str, list[Mistake]]] = {}
    kept = [mistake for mistake in mistakes if mistake.alternative is None]
    for mistake in mistakes:
        if mistake.alternative is not None:
            depth, name = mistake.alternative
            unions.setdefault(mistake.path[:depth], {}).setdefault(name, []).append(mistake)
    for depth, union in ((len(path), union) for path, union in unions.items()):
        for tried in union.values():
            tried.sort(key=lambda mistake: mistake.is_about_type)
        kept += min(
            union.values(),
            key=lambda tried: (any(len(m.path) == depth and m.is_about_type for m in tried), len(tried)),
        )
    return kept


def _sentence(mistake: Mistake, root: Node, model: type[Section]) -> str:
    kind, node = mistake.kind, mistake.node
    if node is None:
        return _missing(mistake, root, model)
    if kind == "extra_forbidden":
        return _unknown(mistake, root, model)
    if mistake.is_about_type:
        return _wrong_type(mistake, node, schema.kinds_at(model, mistake.path, root))
    own = mistake.detail.get("ctx", {}).get("error")
    text = str(own) if own is not None else mistake.detail["msg"]
    rule = _RULE.fullmatch(text)
    if own is None and rule is not None:
        return f"{node.place}: `{mistake.key}` must {rule[1]}, found {node}"
    return f"{node.place}{_changed(node)}: {f'`{mistake.key}`: ' if mistake.path else ''}{text}"


def _changed(node: Node) -> str:
    """Return which keys of a section that is wrong as a whole were given on the command line."""
    if not isinstance(node.value, dict) or node.place == COMMAND_LINE:
        return ""
    changed = [key for key, inner in node.value.items() if COMMAND_LINE in inner.places()]
    return f" (with {', '.join(changed)} from the {COMMAND_LINE})" if changed else ""


def _missing(mistake: Mistake, root: Node, model: type[Section]) -> str:
    """Return the sentence about a required key, or about a list with too few items."""
    if isinstance(mistake.parent.value, list):
        kinds = schema.kinds_at(model, mistake.path[:-1], root)
        count, key = max(len(get_args(kind)) for kind in kinds), ".".join(map(str, mistake.path[:-1]))
        return f"{mistake.parent.place}: `{key}` wants {count} items, found {len(mistake.parent.value)}"
    words = schema.wanted(schema.kinds_at(model, mistake.path, root))
    return f"{mistake.parent.place}: missing required key `{mistake.key}`, which wants {words}"


def _wrong_type(mistake: Mistake, node: Node, kinds: Sequence[Any]) -> str:
    hint = ""
    families = [family for kind in kinds if (family := schema.family_of(kind)) is not None]
    if isinstance(node.value, str) and families and (near := did_you_mean(node.value, families[0].names())):
        hint = near.replace("`", f"`{mistake.key}.{families[0].key}=", 1)
    elif isinstance(node.value, str) and not node.is_null and list(map(schema.is_list, kinds)) == [True]:
        hint = f"; a list of one item is written [{node.value}]"
    elif isinstance(node.value, str) and (meant := suggestions.MEANT_BY_VALUE.get(node.value.lower())) is not None:
        hint = did_you_mean(meant, [str(choice) for kind in kinds for choice in schema.choices(kind)])
    elif isinstance(node.value, str):
        texts = [str(choice) for kind in kinds for choice in schema.choices(kind) if choice is not None]
        hint = did_you_mean(node.value, texts)
        if not hint and str in kinds and node.is_null and node.value:
            hint = f"; put it in quotes to mean the text {node.value}"
    return f"{node.place}: `{mistake.key}` wants {schema.wanted(kinds)}, found {node}{hint}"


def _unknown(mistake: Mistake, root: Node, model: type[Section]) -> str:
    """Return the sentence about a key that its section does not have."""
    node, name = mistake.node, str(mistake.path[-1])
    assert node is not None
    kinds, parent = schema.kinds_at(model, mistake.path[:-1], root), _at(mistake.path[:-1], root)
    sections = [section for kind in kinds if (section := schema.section_of(kind, parent)) is not None]
    if mistake.alternative is not None:
        sections = [section for section in sections if section.__name__ == mistake.alternative[1]] or sections
    keys = list(schema.keys_of(sections[0]))
    owners = [owner for kind in kinds for owner, section in schema.members_of(kind) if name in schema.keys_of(section)]
    if owners:
        meant = f", a key of {', '.join(owners)}{_chosen(mistake.key, node.place, kinds, parent, root)}; "
    else:
        meant = _meant(name, node, mistake.key, keys, model)
        if meant == "; ":  # of a module outside the package, perhaps, which a file below named
            meant = f"{_chosen(mistake.key, node.place, kinds, parent, root)}; "
    return f"{node.place}: unknown key `{mistake.key}`{meant}keys here: {', '.join(keys)}"


def _chosen(full: str, given: Place, kinds: Sequence[Any], section: Node, root: Node) -> str:
    """Return which member of its family a section names, and how to take back a key that another file gave.

    The text is empty if no member is named, or in the same file as the key.
    """
    families = [family for kind in kinds if (family := schema.family_of(kind)) is not None]
    chosen = section.child(families[0].key) if families else None
    if chosen is None or given.source == chosen.place.source:
        return ""
    above, _, key = full.rpartition(".")
    named = f", while `{above}.{families[0].key}` is {chosen.value} ({chosen.place})"
    if given == COMMAND_LINE or (given.source == root.place.source and chosen.place != COMMAND_LINE):
        return named  # nothing lies above the key
    if chosen.place == COMMAND_LINE:
        return f"{named}; take it back with {full}=null"
    return f"{named}; take it back with `{key}: null` under `{above}` in {root.place.source}"


def _meant(name: str, node: Node, full: str, keys: list[str], model: type[Section]) -> str:
    """Return the words between an unknown key and the keys of its section."""
    if isinstance(node.value, dict) and (inner := _meant_inside(node.value, full, model)):
        return f"; {inner} "
    if (answer := suggestions.answer_elsewhere(full)) is not None:
        return f": {answer}; "
    elsewhere = [path for path in schema.dotted_keys(model) if path.split(".")[-1] == name]
    if len(elsewhere) == 1:  # the right name on the wrong level
        return f"; did you mean `{elsewhere[0]}`? "
    if suggestions.key_elsewhere(full) is None and (near := did_you_mean(name, keys)):
        section = full[: len(full) - len(name)]
        return f"{near.replace('`', f'`{section}', 1)} "
    similar = similar_key(full, model)
    return f"; did you mean `{similar}`? " if similar is not None else "; "


def _meant_inside(entries: dict[str, Node], full: str, model: type[Section]) -> str:
    """Return the keys here for those in a section that another trainer has, such as `training:`."""
    known = schema.dotted_keys(model)
    sections = difflib.get_close_matches(full, known, n=1, cutoff=0.6)
    if sections and all(f"{sections[0]}.{name}" in known for name in entries):
        return f"did you mean `{sections[0]}`?"
    pairs = [(f"{full}.{name}", similar_key(f"{full}.{name}", model)) for name in entries]
    meant = [f"`{theirs}` is `{ours}` here" for theirs, ours in pairs if ours is not None]
    return ", ".join(meant[:_MAX_SUGGESTIONS]) + ";" * bool(meant)


class Reading(NamedTuple):
    """Reading of a value other than the one its looks suggest."""

    kind: str
    """Pydantic's error that called for it."""
    convert: Callable[[Any], Any]
    """Function of the value that it looks like."""


Readings = dict[KeyPath, Reading]


def validated(tree: Node, model: type[T]) -> T:
    """Return the tree as `model`.

    Raises:
        ConfigError: all mistakes found, a line each.
    """
    readings: Readings = {}
    tried: list[set[tuple[KeyPath, str]]] = []
    while True:
        try:
            return model.model_validate(_values(tree, readings), strict=True, context={"strict": True})
        except ValidationError as error:
            mistakes = located(error.errors(include_url=False), tree)
        is_changed = any([_filled(mistake, tree, model) or _taken_back(mistake, tree) for mistake in mistakes])
        tried.append({(path, reading.kind) for path, reading in readings.items()})
        readings |= _readings(mistakes, readings, tree, model)
        if not is_changed and {(path, reading.kind) for path, reading in readings.items()} in tried:
            raise ConfigError("\n".join(sentences(mistakes, tree, model)))


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


def _taken_back(mistake: Mistake, tree: Node) -> bool:
    """Remove an unknown key whose null takes back what a file below gave to another member of its family."""
    *above, key = mistake.path or ("",)
    is_taken_back = mistake.kind == "extra_forbidden" and mistake.node is not None and mistake.node.takes_back
    if is_taken_back and mistake.alternative is None:
        section = _at(above, tree)
        assert isinstance(section.value, dict)
        del section.value[str(key)]
        return True
    return False


def _at(path: Sequence[int | str], root: Node) -> Node:
    """Return the innermost value that exists on a path."""
    for part in path:
        root = root.child(part) or root
    return root


def _values(node: Node, readings: Readings, path: KeyPath = ()) -> Any:
    """Return plain Python values, each read as the readings have it."""
    if isinstance(node.value, dict):
        return {key: _values(inner, readings, (*path, key)) for key, inner in node.value.items()}
    if isinstance(node.value, list):
        found: Any = [_values(inner, readings, (*path, index)) for index, inner in enumerate(node.value)]
    else:
        found = node.value if node.is_quoted else nodes.as_anything(node.value)
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
            value = nodes.as_integer(node.value) if kind == "int_type" else nodes.as_truth(node.value)
    return None if value is None else lambda _: value


def _instance(words: Any, kinds: Sequence[Any]) -> Any:
    for kind in kinds:
        with contextlib.suppress(ValidationError):
            return TypeAdapter(kind).validate_python(words)
    return None
