"""The reference of all keys of a configuration, from its schema: key, type, default, bounds and meaning.

`python -m megadiff.config.reference > docs/configuration.md` writes the page; with `--json-schema` it prints the JSON
schema with which editors check a run description.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megadiff.config import schema
from megadiff.config.load import dump_value
from megadiff.config.section import Section
from megadiff.config.suggestions import did_you_mean
from megadiff.errors import ConfigError

RUN = "megadiff.run.config.RunConfig"
"""Configuration that is described unless another is given."""

_BOUNDS = {
    "gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "multiple_of": "a multiple of {}",
    "min_length": "length >= {}", "max_length": "length <= {}", "pattern": "matches {}",
}  # fmt: skip

_HEAD = """# Configuration

Every key of a run description. Generated from the schema by `python -m megadiff.config.reference`; do not edit.

Values are taken from the defaults below, then from the files under `base:` in the order given, then from the YAML file
itself, then from `key.sub=value` on the command line. `base` is a path, or a list of paths, relative to the file in
which it is written. Where a base file chose another noise process, optimizer or the like, `null` takes back a key that
the one chosen now does not have. `megadiff train --keys [PREFIX]` prints this reference in the terminal.
"""

_TABLE = ("| key | type | default | bounds | meaning |", "|---|---|---|---|---|")


@dataclass(frozen=True)
class Key:
    """One key that takes a value, or a group of keys that is a section."""

    name: str
    """Dotted key; `[]` after the key of a list of sections."""
    takes: str
    """Type in words."""
    default: str
    """Default as YAML; `required` where there is none, and empty for a section."""
    bounds: str
    """Bounds of the value; empty if there are none."""
    meaning: str
    """Docstring of the field, or of the section."""
    is_section: bool = False
    """Whether the keys of this section follow."""


def keys(model: type[Section], above: str = "", defaults: Section | None = None) -> Iterator[Key]:
    """Yield every key below a section, values before sections; of a family, the shared keys and then each member's."""
    nested: list[Key] = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        kinds = schema.alternatives(schema.annotation_of(field))
        below = [found for kind in kinds for found in _sections(kind)]
        if [mark for _, mark in below] != [""] * len(kinds):
            yield _value(above + key, field, getattr(defaults, name, field.get_default(call_default_factory=True)))
        for kind, mark in below:
            default = field.default if isinstance(field.default, Section) else None
            nested += _section(f"{above}{key}{mark}", kind, default)
    yield from nested


def plain_text(model: type[Section], prefix: str = "") -> str:
    """Return the reference for a terminal.

    Args:
        model: the configuration.
        prefix: beginning of the keys to which the reference is limited.

    Raises:
        ConfigError: no key begins so.
    """
    found = list(keys(model))
    chosen = [key for key in found if key.name.replace("[]", "").startswith(prefix)]
    if not chosen:
        hint = did_you_mean(prefix, schema.dotted_keys(model))
        raise ConfigError(f"--keys {prefix}: a run description has no such key{hint}")
    parts = []
    for key in chosen:
        facts = ", ".join(part for part in (key.takes, key.bounds, key.default and f"default {key.default}") if part)
        meaning = textwrap.fill(key.meaning, 110, initial_indent="    ", subsequent_indent="    ")
        parts.append(f"{key.name}: {facts.replace('default required', 'required')}\n{meaning}".rstrip())
    return "\n".join(parts)


def markdown(model: type[Section]) -> str:
    """Return the reference as a Markdown page with one table a section."""
    lines = [_HEAD, *_TABLE]
    for key in keys(model):
        if key.is_section:
            lines += ["", f"## `{key.name}`", "", key.meaning, "", *_TABLE]
        else:
            cells = (f"`{key.name}`", key.takes, f"`{key.default}`", key.bounds, key.meaning)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines).replace("`required`", "required") + "\n"


def _sections(kind: Any) -> list[tuple[Any, str]]:
    """Return the sections that an alternative holds, each with the mark that its key gets."""
    if schema.section_of(kind) is not None:
        return [(kind, "")]
    return [(inner, "[]") for arg in get_args(kind) for inner in schema.alternatives(arg) if schema.section_of(inner)]


def _section(name: str, kind: Any, default: Section | None) -> Iterator[Key]:
    """Yield the heading of a section and its keys; of a family, then each member's heading and own keys."""
    family = schema.family_of(kind)
    shared = schema.section_of(kind) if family is None else get_args(kind)[0]
    assert shared is not None
    above = list(keys(shared, f"{name}.", default))
    yield Key(name, "a section", "", "", _joined(shared.__doc__), is_section=True)
    if family is None:
        yield from above
        return
    for key in above:
        is_name = key.name == f"{name}.{family.key}"
        yield replace(key, takes=f"text: {', '.join(family.names())}, or a dotted path") if is_name else key
    for member, section in family.sections(shared):
        own = [key for key in keys(section, f"{name}.", default) if key not in above]
        if own:
            yield Key(f"{name}.{family.key}: {member}", "a member", "", "", _joined(section.__doc__), is_section=True)
            yield from own


def _value(name: str, field: FieldInfo, default: Any) -> Key:
    written = "required" if default is PydanticUndefined else dump_value(default)
    bounds = [
        words.format(value)
        for extra in field.metadata
        for bound, words in _BOUNDS.items()
        if (value := getattr(extra, bound, None)) is not None
    ]
    takes = schema.wanted(schema.alternatives(schema.annotation_of(field)))
    return Key(name, takes, written, ", ".join(bounds), _joined(field.description))


def _joined(text: str | None) -> str:
    """Return a docstring as one line."""
    return " ".join((text or "").split())


def main() -> None:
    """Print the reference of a configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=RUN, help=f"dotted path of a Section (default: {RUN})")
    parser.add_argument("--json-schema", action="store_true", help="print the JSON schema instead")
    arguments = parser.parse_args()
    module, _, name = arguments.model.rpartition(".")
    model = getattr(importlib.import_module(module), name)
    sys.stdout.write(json.dumps(json_schema(model), indent=2) + "\n" if arguments.json_schema else markdown(model))


def json_schema(model: type[Section]) -> dict[str, Any]:
    """Return the JSON schema with which editors check a run description, `base` included."""
    found = model.model_json_schema(by_alias=True)
    base = {"type": "string", "description": "A run description this one builds upon, relative to this file."}
    either = {"anyOf": [base, {"type": "array", "items": {"type": "string"}}]}
    found["properties"] = {"base": either, **found.get("properties", {})}
    return found


if __name__ == "__main__":
    main()
