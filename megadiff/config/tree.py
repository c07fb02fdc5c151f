"""The untyped tree a run description is read into: every value remembers which file and line it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

NULL_TEXTS = frozenset({"", "~", "null", "Null", "NULL"})


@dataclass(frozen=True)
class Place:
    """Where something was written: a file and, when there is one, its line (from 1)."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


COMMAND_LINE = Place("command line")


@dataclass(frozen=True)
class Scalar:
    """One value as the user typed it; it becomes a number or a truth value only once a field's type asks for it."""

    text: str
    place: Place
    quoted: bool = False

    @property
    def is_null(self) -> bool:
        """Whether nothing was given: an empty value, `~` or `null`, not in quotes."""
        return not self.quoted and self.text in NULL_TEXTS


@dataclass(frozen=True)
class Items:
    """A list."""

    items: tuple[Tree, ...]
    place: Place


class Entry(NamedTuple):
    """A key's value, and where the key itself stands."""

    place: Place
    tree: Tree


@dataclass(frozen=True)
class Group:
    """A mapping; keys in the order they were written."""

    entries: dict[str, Entry]
    place: Place


Tree = Scalar | Items | Group


def merge(under: Tree, over: Tree) -> Tree:
    """`over` laid upon `under`: groups merge key by key at every depth, anything else is replaced whole."""
    if not (isinstance(under, Group) and isinstance(over, Group)):
        return over
    entries = dict(under.entries)
    for key, entry in over.entries.items():
        before = entries.get(key)
        entries[key] = entry if before is None else Entry(entry.place, merge(before.tree, entry.tree))
    return Group(entries, under.place if over.place == COMMAND_LINE else over.place)


def found(tree: Tree) -> str:
    """What stands there, in the words of an error message."""
    if isinstance(tree, Group):
        return "a mapping"
    if isinstance(tree, Items):
        return "a list"
    if tree.is_null:
        return "nothing (null)"
    text = tree.text if len(tree.text) <= 60 else tree.text[:57] + "..."
    return f"the quoted text {text!r}" if tree.quoted else f"`{text}`"
