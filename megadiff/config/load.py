"""A run description: YAML files and command-line overrides -> a frozen, typed tree, or a clear sentence per mistake.

Precedence: defaults < `base:` files in the order given < the file itself < `key.sub=value` overrides. Mappings merge
key by key at every depth; lists are replaced whole.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megadiff.config import scalars
from megadiff.config.command_line import setting_without_equals
from megadiff.config.overrides import apply_override
from megadiff.config.refusals import similar_path
from megadiff.config.section import Section
from megadiff.config.tree import COMMAND_LINE, Group, Items, Place, Scalar, Tree, found, merge
from megadiff.config.typed import Reader
from megadiff.config.yaml_text import parse_yaml
from megadiff.errors import ConfigError
from megadiff.untrusted_files import UnreadableFileError, read_text, why

T = TypeVar("T", bound=Section)

MAX_BYTES = 1_000_000


def load_config(path: str | Path, overrides: Sequence[str], model: type[T]) -> T:
    """Read the run description at `path`, lay the overrides upon it and check it as `model`.

    A number is read as the field's type wants it (`1e22`, `3e-4`, `1_000`, and `1e6` for an integer); a text field
    keeps what was typed (`no`, `12:30`). A key under `base:` is a path, or a list of paths, relative to the file it
    stands in.

    Raises:
        ConfigError: all mistakes found, a line each, each with its file and line or `command line`.
    """
    path = Path(path)
    tree: Tree = _Files().tree(path, Place(str(path)), named_by=None)
    if (written := setting_without_equals(overrides)) is not None:
        raise ConfigError(f"{COMMAND_LINE}: {written}")
    for override in overrides:
        tree = apply_override(tree, override)
    if not isinstance(tree, Group):
        raise ConfigError(f"{tree.place}: the top level must be a mapping of keys, found {found(tree)}")
    reader = Reader(model)
    config = reader.section(model, tree, "")
    if not isinstance(config, model):
        raise ConfigError("\n".join(reader.problems))
    return config


def dump_config(config: Section) -> str:
    """The whole resolved tree as YAML in the order of its fields; `load_config` gives back an equal tree."""
    return yaml.dump(
        config.model_dump(mode="json", by_alias=True),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=10_000,
    )


def json_schema(model: type[Section]) -> dict[str, Any]:
    """The JSON schema editors check a run description against, `base` included."""
    schema = model.model_json_schema(by_alias=True)
    base = {"type": "string", "description": "A run description this one builds upon, relative to this file."}
    either = {"anyOf": [base, {"type": "array", "items": {"type": "string"}}]}
    schema["properties"] = {"base": either, **schema.get("properties", {})}
    return schema


class _Files:
    """Reads a file and, once each, the base files below it."""

    def __init__(self) -> None:
        self._done: dict[Path, Group] = {}
        self._open: list[tuple[Path, str]] = []

    def tree(self, path: Path, shown: Place, *, named_by: Place | None) -> Group:
        """The file's tree laid upon its base files' trees."""
        real = Path(os.path.realpath(path))
        names = [name for _, name in self._open]
        if real in (opened for opened, _ in self._open):
            circle = " -> ".join([*names, str(path)])
            raise ConfigError(f"{named_by}: base files go in a circle: {circle}")
        if real not in self._done:
            self._open.append((real, str(path)))
            self._done[real] = self._merged(path, shown, named_by)
            self._open.pop()
        return self._done[real]

    def _merged(self, path: Path, shown: Place, named_by: Place | None) -> Group:
        top = parse_yaml(_text(path, named_by), shown.source)
        if top is None or (isinstance(top, Scalar) and top.is_null):
            raise ConfigError(f"{shown}: the file is empty; a mapping of keys is wanted")
        if not isinstance(top, Group):
            raise ConfigError(f"{top.place}: the top level must be a mapping of keys, found {found(top)}")
        base = top.entries.get("base")
        own = Group({key: entry for key, entry in top.entries.items() if key != "base"}, shown)
        tree: Tree = Group({}, shown)
        for name in _base_names(base.tree) if base is not None else []:
            below = Path(os.path.normpath(path.parent / name.text))
            tree = merge(tree, self.tree(below, Place(str(below)), named_by=name.place))
        merged = merge(tree, own)
        assert isinstance(merged, Group)
        return merged


def _base_names(tree: Tree) -> list[Scalar]:
    names = list(tree.items) if isinstance(tree, Items) else [tree]
    for name in names:
        if not isinstance(name, Scalar) or name.is_null:
            raise ConfigError(f"{name.place}: `base` wants a path or a list of paths, found {found(name)}")
    return [name for name in names if isinstance(name, Scalar)]


def _text(path: Path, named_by: Place | None) -> str:
    asked = f"{named_by}: the base file {path}" if named_by is not None else f"{path}: the run description"
    try:
        return read_text(path, max_bytes=MAX_BYTES)
    except FileNotFoundError:
        near = similar_path(path)
        remedy = f"did you mean {near}?" if near else "check the path"
        raise ConfigError(f"{asked} does not exist; {remedy}") from None
    except (OSError, UnreadableFileError) as error:
        raise ConfigError(f"{asked} {why(error)}; give the path of a YAML file in UTF-8") from None


class _Dumper(yaml.SafeDumper):
    """Quotes every text that could be read as something else, so that what is dumped loads back equal."""


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    word = Scalar(text, Place(""))
    plain = text.isprintable() and scalars.as_anything(word) == text and scalars.as_truth(text) is None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _text_node)
