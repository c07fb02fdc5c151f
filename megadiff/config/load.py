"""A run description: YAML files and command-line overrides as one frozen, typed tree, or a sentence for each mistake.

Precedence: defaults < `base:` files in the order given < the file itself < `key.sub=value` overrides. Mappings are
merged key by key at every depth; lists are replaced whole. The types and bounds of all keys are pydantic's business.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic_core import to_jsonable_python

from megadiff.config import nodes
from megadiff.config.command_line import setting_without_equals
from megadiff.config.messages import validated
from megadiff.config.nodes import COMMAND_LINE, Node, Place, merge, parse_yaml
from megadiff.config.section import Section
from megadiff.config.suggestions import similar_path
from megadiff.errors import ConfigError
from megadiff.files import UnreadableFileError, read_text, why

T = TypeVar("T", bound=Section)

MAX_BYTES = 1_000_000

_ENDINGS = (".yaml", ".yml")
"""Endings of files that are suggested in the place of one that does not exist."""


def load_config(path: str | Path, overrides: Sequence[str], model: type[T]) -> T:
    """Read the run description at `path`, lay the overrides upon it and validate it as `model`.

    A number is read as the type of its field wants it (`1e22`, `3e-4`, `1_000`, and `1e6` for an integer); a text
    field keeps what was typed (`no`, `12:30`). A key `base:` holds a path, or a list of paths, relative to the file in
    which it is written.

    Raises:
        ConfigError: all mistakes found, a line each, each with its file and line or `command line`.
    """
    tree = _Files().tree(Path(path), named_by=None)
    assert isinstance(tree.value, dict)
    if (other := model.other_kind(tree.value)) is not None:
        raise ConfigError(f"{path}: {other}")
    if (written := setting_without_equals(overrides)) is not None:
        raise ConfigError(f"{COMMAND_LINE}: {written}")
    for override in overrides:
        tree = apply_override(tree, override)
    return validated(tree, model)


def dump_config(config: Section) -> str:
    """Return the whole resolved tree as YAML in the order of its fields; `load_config` reads an equal tree from it."""
    return _yaml(config.model_dump(mode="json", by_alias=True), is_flow=False)


def dump_value(value: Any) -> str:
    """Return one value as YAML on a single line."""
    return _yaml(to_jsonable_python(value), is_flow=True).removesuffix("...\n").strip()


def _yaml(values: Any, *, is_flow: bool) -> str:
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=is_flow
    )


def apply_override(tree: Node, override: str) -> Node:
    """Return the tree with `key.sub=value` laid upon it.

    The value is a plain word (`noise.shift=masked`), something in quotes, a flow list or mapping (`a.b=[1, 2]`), or
    nothing, which is null. A number in the path counts from 0 in a list: `data.train.0.path=x`; the number after the
    last item adds one.

    Raises:
        ConfigError: the override has another form, or names a list item that does not exist.
    """
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path) or key.strip().startswith("-"):
        raise ConfigError(f"{COMMAND_LINE}: `{override}` is not of the form key.sub=value")
    return _placed(tree, path, _override_value(text.strip(), key.strip()), above="")


def _override_value(text: str, key: str) -> Node:
    if not text.startswith(("[", "{", '"', "'")):
        return Node(text, COMMAND_LINE)  # not parsed as YAML: `prompt=a: b #c` is the text the user typed
    try:
        return parse_yaml(text, COMMAND_LINE) or Node("", COMMAND_LINE)
    except ConfigError as error:
        reason = str(error).removeprefix(f"{COMMAND_LINE}: ")
        raise ConfigError(f"{COMMAND_LINE}: the value of `{key}`: {reason}") from None


def _placed(tree: Node | None, path: list[str], value: Node, *, above: str) -> Node:
    """Return `tree`, which is at the dotted key `above`, with `value` at `path`."""
    if not path:
        return merge(tree, value)
    name, rest = path[0], path[1:]
    key = f"{above}.{name}" if above else name
    held = tree.value if tree is not None else ""
    if isinstance(held, list) or (name == "0" and not isinstance(held, dict)):
        items = held if isinstance(held, list) else []
        if not name.isdecimal() or int(name) > len(items):
            last = len(items)
            reason = f"`{above}` is a list of {last}, so `{key}` must name an item from 0 to {last}"
            raise ConfigError(f"{COMMAND_LINE}: {reason}")
        index = int(name)
        changed = _placed(items[index] if index < len(items) else None, rest, value, above=key)
        return Node([*items[:index], changed, *items[index + 1 :]], COMMAND_LINE)
    entries = held if isinstance(held, dict) else {}
    place = tree.place if tree is not None and isinstance(held, dict) else COMMAND_LINE
    return Node({**entries, name: _placed(entries.get(name), rest, value, above=key)}, place)


class _Files:
    """The files of one description, each read once."""

    def __init__(self) -> None:
        self._done: dict[Path, Node] = {}
        self._open: dict[Path, Path] = {}

    def tree(self, path: Path, *, named_by: Place | None) -> Node:
        """Return the file's tree laid upon those of its base files."""
        real = Path(os.path.realpath(path))
        if real in self._open:
            circle = " -> ".join(map(str, [*self._open.values(), path]))
            raise ConfigError(f"{named_by}: base files go in a circle: {circle}")
        if real not in self._done:
            self._open[real] = path
            self._done[real] = self._merged(path, named_by)
            del self._open[real]
        return self._done[real]

    def _merged(self, path: Path, named_by: Place | None) -> Node:
        place = Place(str(path))
        top = parse_yaml(_text(path, named_by), place)
        if top is None or top.is_null:
            raise ConfigError(f"{place}: the file is empty; a mapping of keys is wanted")
        if not isinstance(top.value, dict):
            raise ConfigError(f"{top.place}: the top level must be a mapping of keys, found {top}")
        own = {key: node for key, node in top.value.items() if key != "base"}
        tree = Node({}, place)
        for name in _base_names(top.value.get("base")):
            below = Path(os.path.normpath(path.parent / str(name.value)))
            tree = merge(tree, self.tree(below, named_by=name.place))
        return merge(tree, Node(own, place))


def _base_names(node: Node | None) -> list[Node]:
    names = [] if node is None else node.value if isinstance(node.value, list) else [node]
    for name in names:
        if not isinstance(name.value, str) or name.is_null:
            raise ConfigError(f"{name.place}: `base` wants a path or a list of paths, found {name}")
    return names


def _text(path: Path, named_by: Place | None) -> str:
    subject = f"{named_by}: the base file {path}" if named_by is not None else f"{path}: the run description"
    try:
        return read_text(path, max_bytes=MAX_BYTES)
    except FileNotFoundError:
        near = similar_path(path, lambda found: found.suffix in _ENDINGS)
        raise ConfigError(f"{subject} does not exist{f'; did you mean {near}?' if near else ''}") from None
    except (OSError, UnreadableFileError) as error:
        raise ConfigError(f"{subject} {why(error)}; give the path of a YAML file in UTF-8") from None


class _Dumper(yaml.SafeDumper):
    """Quotes every text that could be read as something else, so that what is dumped reads back equal."""


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    is_plain = text.isprintable() and nodes.as_anything(text) == text and nodes.as_truth(text) is None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


_Dumper.add_representer(str, _text_node)
