"""What pydantic refuses, said in our words: place, dotted key, rule, and the value that was found."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megadiff.config import field_types
from megadiff.config.section import Section
from megadiff.config.tree import COMMAND_LINE, Group, Items, Place, Tree, found

_RULE = re.compile(r"(?:Input|List|Tuple|String|Dictionary) should (.*?)(?: after validation, not \d+)?")
"""Pydantic's wording of a bound; what follows `should` reads well after `must`."""


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """`; did you mean `x`?` for the nearest word, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean `{near[0]}`?" if near else ""


def similar_path(path: str | Path, *, ending: str = "") -> str | None:
    """Return the path in the same folder whose name is nearest to that of a path which does not exist, if any is near.

    Args:
        path: what was given, without `ending`.
        ending: how the names that count end; it is left out of the answer.
    """
    folder = Path(path).parent
    try:
        names = sorted(found.name.removesuffix(ending) for found in folder.glob(f"*{ending}"))
    except OSError:
        return None
    by_stem = {Path(name).stem: name for name in reversed(names)}  # endings alone make no two names alike
    near = difflib.get_close_matches(Path(path).stem, by_stem, n=1, cutoff=0.6)
    return str(folder / by_stem[near[0]]) if near else None


def at(group: Group, key: str, text: str) -> str:
    """A complaint about a whole section, which may have been written in a file and changed on the command line."""
    changed = [name for name, entry in group.entries.items() if _last_place(entry.tree) == COMMAND_LINE]
    also = ""
    if changed and group.place != COMMAND_LINE:
        also = f" (with {', '.join(changed)} from the {COMMAND_LINE})"
    return f"{group.place}{also}: {f'`{key}`: ' if key else ''}{text}"


def sentences(error: ValidationError, group: Group, key: str, model: type[Section], *, skip: set[str]) -> list[str]:
    """One sentence per field that was refused; `skip` names the fields already complained about."""
    said: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        loc = detail["loc"]
        if loc and str(loc[0]) in skip:
            continue
        tree, dotted = _walk(group, key, loc)
        sentence = _sentence(detail, group, tree, dotted, model)
        # The alternatives of a union each refuse in turn: the one that is not about the type says most.
        if dotted not in said or (not detail["type"].endswith(("_type", "_parsing")) and "`" not in said[dotted]):
            said[dotted] = sentence
    return list(said.values())


def _sentence(detail: Any, group: Group, tree: Tree | None, dotted: str, model: type[Section]) -> str:
    kind, loc = detail["type"], detail["loc"]
    if kind == "missing":
        field = field_types.keys_of(model).get(str(loc[0]))
        wants = f", which wants {field_types.wanted(field.annotation)}" if field is not None else ""
        return f"{group.place}: missing required key `{dotted}`{wants}"
    own = detail.get("ctx", {}).get("error")
    text = str(own) if own is not None else detail["msg"]
    if not loc:
        return at(group, dotted, text)
    place: Place = tree.place if tree is not None else group.place
    rule = _RULE.fullmatch(text)
    if own is not None or rule is None:
        return f"{place}: `{dotted}`: {text}"
    value = found(tree) if tree is not None else f"`{detail['input']}`"
    return f"{place}: `{dotted}` must {rule[1]}, found {value}"


def _walk(group: Group, key: str, loc: tuple[int | str, ...]) -> tuple[Tree | None, str]:
    """The tree an error's location points at, and its dotted key; a union's tags, in no tree, are left out."""
    tree: Tree | None = group
    names = [key] if key else []
    for depth, part in enumerate(loc):
        if isinstance(tree, Group) and str(part) in tree.entries:
            tree = tree.entries[str(part)].tree
        elif isinstance(tree, Items) and isinstance(part, int) and part < len(tree.items):
            tree = tree.items[part]
        elif depth == 0:
            tree = None
        else:
            continue
        names.append(str(part))
    return tree, ".".join(names)


def _last_place(tree: Tree) -> Place:
    if isinstance(tree, Group):
        places = {_last_place(entry.tree) for entry in tree.entries.values()}
        return COMMAND_LINE if COMMAND_LINE in places else tree.place
    return tree.place
