"""YAML text -> a tree with places. Strict: one document, no key twice, no tags, no alias bombs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import yaml
from yaml import events

from megadiff.config.tree import Entry, Group, Items, Place, Scalar, Tree
from megadiff.errors import ConfigError, shown

MAX_NODES = 50_000
"""Values a file may hold once its aliases are written out; a run description needs a few hundred."""

MAX_DEPTH = 40

MAX_CHARACTERS = 1_000_000
"""Of one document; more is refused before the parser sees any of it."""


def parse_yaml(text: str, source: str, *, with_lines: bool = True) -> Tree | None:
    """Read one YAML document; None when it holds nothing.

    Args:
        text: the document.
        source: what messages call it, such as the file's path.
        with_lines: whether places carry line numbers (a file's do, the command line's do not).

    Raises:
        ConfigError: bad syntax, a key given twice, a tag, more than one document, too long a text, too many or too
            deep values.
    """
    if len(text) > MAX_CHARACTERS:
        held = f"{len(text)} characters where at most {MAX_CHARACTERS} are wanted"
        raise ConfigError(f"{source}: {held}, so it is hardly a run description; give the run's own file")
    try:
        return _Composer(text, source, with_lines).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None and with_lines else None
        why = ", ".join(part for part in (error.context, error.problem) if part)
        why += "; indent with spaces" if "'\\t'" in why else ""
        raise ConfigError(f"{Place(source, line)}: not valid YAML: {why}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1 if with_lines else None
        character = chr(error.character) if isinstance(error.character, int) else error.character
        raise ConfigError(f"{Place(source, line)}: not valid YAML: the control character {character!r}") from None


class _Composer:
    """Builds the tree from parser events, so that aliases and depth are counted before anything grows."""

    def __init__(self, text: str, source: str, with_lines: bool) -> None:
        # The pure Python parser on purpose: libyaml words its errors differently and recurses on the C stack.
        self._events: Iterator[events.Event] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._source = source
        self._with_lines = with_lines
        self._anchors: dict[str, tuple[Tree, int]] = {}
        self._nodes = 0

    def document(self) -> Tree | None:
        next(self._events)  # the stream's start
        if isinstance(next(self._events), events.StreamEndEvent):
            return None
        tree = self._tree(next(self._events), 0)
        next(self._events)  # the document's end
        after = next(self._events)
        if not isinstance(after, events.StreamEndEvent):
            raise ConfigError(f"{self._place(after)}: a second YAML document starts here; one is wanted")
        return tree

    def _place(self, event: events.Event) -> Place:
        return Place(self._source, event.start_mark.line + 1 if self._with_lines else None)

    def _count(self, nodes: int, event: events.Event) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise ConfigError(f"{self._place(event)}: more than {MAX_NODES} values once aliases are written out")

    def _tree(self, event: events.Event, depth: int) -> Tree:
        if isinstance(event, events.AliasEvent):
            return self._alias(event)
        if not isinstance(event, events.NodeEvent):
            raise AssertionError(f"not the start of a value: {event!r}")
        tag: str | None = getattr(event, "tag", None)
        if tag is not None:
            raise ConfigError(f"{self._place(event)}: the tag `{_short_tag(tag)}` is not allowed; write a plain value")
        if depth > MAX_DEPTH:
            raise ConfigError(f"{self._place(event)}: values are nested deeper than {MAX_DEPTH} levels")
        before = self._nodes
        self._count(1, event)
        if isinstance(event, events.ScalarEvent):
            self._refuse_what_no_path_can_hold(event)
            tree: Tree = Scalar(event.value, self._place(event), quoted=event.style is not None)
        elif isinstance(event, events.SequenceStartEvent):
            tree = Items(
                tuple(self._tree(inner, depth + 1) for inner in self._until(events.SequenceEndEvent)),
                self._place(event),
            )
        else:
            tree = self._group(event, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = (tree, self._nodes - before)
        return tree

    def _refuse_what_no_path_can_hold(self, event: events.ScalarEvent) -> None:
        """Escapes in quotes can spell characters that neither a file's name nor a UTF-8 file can hold."""
        wrong = next((c for c in event.value if c == "\0" or "\ud800" <= c <= "\udfff"), None)
        if wrong is not None:
            what = "a NUL character" if wrong == "\0" else "half of a surrogate pair"
            raise ConfigError(
                f"{self._place(event)}: {shown(event.value)} holds {what}, which no setting may; remove it"
            )

    def _until(self, end: type[events.Event]) -> Iterator[events.Event]:
        while not isinstance(event := next(self._events), end):
            yield event

    def _alias(self, event: events.AliasEvent) -> Tree:
        if event.anchor not in self._anchors:  # an anchor is known only once its value is complete
            raise ConfigError(
                f"{self._place(event)}: the alias `*{_clipped(event.anchor or '')}` stands for nothing defined above it"
            )
        tree, nodes = self._anchors[event.anchor]
        self._count(nodes, event)
        return tree

    def _group(self, start: events.Event, depth: int) -> Group:
        entries: dict[str, Entry] = {}
        for event in self._until(events.MappingEndEvent):
            place, key = self._place(event), self._tree(event, depth + 1)
            if not isinstance(key, Scalar):
                raise ConfigError(
                    f"{place}: a key must be a word, found {'a list' if isinstance(key, Items) else 'a mapping'}"
                )
            if key.text == "<<" and not key.quoted:
                raise ConfigError(
                    f"{place}: merge keys (`<<`) are not supported; put what is shared into a `base:` file"
                )
            if key.text in entries:
                first = entries[key.text].place.line
                where = f", first on line {first}" if first is not None else ""
                raise ConfigError(f"{place}: the key `{_clipped(key.text)}` is given twice{where}")
            value = self._tree(next(self._events), depth + 1)
            if isinstance(value, Group):
                value = replace(value, place=place)  # its key's line, not that of the first key inside
            entries[key.text] = Entry(place, value)
        return Group(entries, self._place(start))


def _short_tag(tag: str) -> str:
    return _clipped(tag.replace("tag:yaml.org,2002:", "!!"))


def _clipped(name: str) -> str:
    return name if len(name) <= 80 else name[:80] + "..."
