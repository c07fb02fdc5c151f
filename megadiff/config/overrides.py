"""`key.sub=value` from the command line, laid upon the tree the files gave."""

from __future__ import annotations

from megadiff.config.tree import COMMAND_LINE, Entry, Group, Items, Scalar, Tree, merge
from megadiff.config.yaml_text import parse_yaml
from megadiff.errors import ConfigError


def apply_override(tree: Tree, override: str) -> Tree:
    """The tree with one override laid upon it.

    The value is a plain word (`noise.shift=masked`), something in quotes, a flow list or mapping (`a.b=[1, 2]`), or
    nothing, which is null. A number in the path counts from 0 in a list: `data.train.0.path=x`; the number after the
    last item adds one.

    Raises:
        ConfigError: the override has another form, or names a list item that does not exist.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    path = key.split(".")
    if not equals or not all(path) or key.startswith("-"):
        raise ConfigError(f"{COMMAND_LINE}: `{override}` is not of the form key.sub=value")
    return _placed(tree, path, _value(text.strip(), key), done="")


def _value(text: str, key: str) -> Tree:
    if not text.startswith(("[", "{", '"', "'")):
        return Scalar(text, COMMAND_LINE)  # not YAML on purpose: `prompt=a: b #c` is the text the user typed
    try:
        value = parse_yaml(text, COMMAND_LINE.source, with_lines=False)
    except ConfigError as error:
        reason = str(error).removeprefix(f"{COMMAND_LINE}: ")
        raise ConfigError(f"{COMMAND_LINE}: the value of `{key}`: {reason}") from None
    return value if value is not None else Scalar("", COMMAND_LINE)


def _placed(tree: Tree | None, path: list[str], value: Tree, *, done: str) -> Tree:
    """`tree` with `value` at `path`; `done` is the path walked so far, for messages."""
    if not path:
        return value if tree is None else merge(tree, value)
    name, rest = path[0], path[1:]
    here = f"{done}.{name}" if done else name
    if isinstance(tree, Items) or (name == "0" and not isinstance(tree, Group)):
        items = tree.items if isinstance(tree, Items) else ()
        if not name.isdecimal() or int(name) > len(items):
            last = len(items)
            raise ConfigError(
                f"{COMMAND_LINE}: `{done}` is a list of {last}, so `{here}` must name an item from 0 to {last}"
            )
        index = int(name)
        inner = items[index] if index < len(items) else None
        changed = _placed(inner, rest, value, done=here)
        return Items((*items[:index], changed, *items[index + 1 :]), COMMAND_LINE)
    group = tree if isinstance(tree, Group) else Group({}, COMMAND_LINE)
    before = group.entries.get(name)
    inner = _placed(None if before is None else before.tree, rest, value, done=here)
    kept = before.place if before is not None and rest else COMMAND_LINE
    return Group({**group.entries, name: Entry(kept, inner)}, group.place)
