"""Command lines with `key=value` settings beside their options, and messages about settings written another way."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megadiff.config.nodes import COMMAND_LINE
from megadiff.config.schema import dotted_keys
from megadiff.config.section import Section
from megadiff.config.suggestions import answer_elsewhere, key_elsewhere
from megadiff.errors import ConfigError

_WRONG_VALUE = re.compile(r"argument (?P<option>.*?): invalid (?P<type>float|int|_\w+) value: (?P<found>.*)", re.DOTALL)
"""Argparse's message for a value that its type could not read; names that begin with `_` are types of integers."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises a `ConfigError` of one sentence in place of printing the usage text.

    Descriptions and epilogs are shown as they are written. The program's name is how the command was called:
    `generate.py`, or `megadiff generate` from `megadiff/__main__.py`, which puts that into `sys.argv`.

    Args:
        keywords: keyword arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, **keywords: Any) -> None:
        own = {"prog": Path(sys.argv[0]).name, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**{**own, **keywords})

    def error(self, message: str) -> NoReturn:
        """Refuse the command line, with the option that was probably meant where one is misspelled."""
        if (value := _WRONG_VALUE.fullmatch(message)) is not None:
            kind = "a number" if value["type"] == "float" else "an integer"
            message = f"argument {value['option']}: wants {kind}, found {value['found']}"
        if "required: --config" in message:
            given = [word for word in sys.argv[1:] if word.endswith((".yaml", ".yml"))]
            if given:
                raise ConfigError(f"{COMMAND_LINE}: {message}; did you mean `--config {given[0]}`?")
        _, found, unknown = message.partition("unrecognized arguments: ")
        near = difflib.get_close_matches(unknown.partition("=")[0].split(" ")[0], self.long_options(), n=1, cutoff=0.7)
        hint = f"; did you mean `{near[0]}`?" if found and near else f"; `{self.prog} --help` lists the options"
        raise ConfigError(f"{COMMAND_LINE}: {message}{hint}")

    def long_options(self) -> list[str]:
        """Return the options that begin with two dashes, sorted."""
        options = (option for action in self._actions for option in action.option_strings)
        return sorted(option for option in options if option.startswith("--"))


class SettingsParser(CommandParser):
    """A parser of options and `key=value` settings.

    Args:
        settings_help: help of the positional argument, which is `overrides` in the result.
        metavar: name of the positional argument.
        keywords: keyword arguments of `argparse.ArgumentParser`.
    """

    def __init__(
        self, *, settings_help: str = "settings over the file's", metavar: str = "key=value", **keywords: Any
    ) -> None:
        super().__init__(**keywords)
        self.add_argument("overrides", nargs="*", metavar=metavar, help=settings_help)

    def parse_with_settings(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse a command line with its settings at any place.

        Args:
            argv: the words after the command (default: those of this process).

        Returns:
            The arguments. `unknown` lists the options that this parser does not have, each with the word after it where
            that is neither an option nor a setting; pass the arguments to `refuse_unknown`.

        Raises:
            ConfigError: an option lacks its value or has a wrong one, or a required one is missing.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        arguments, unknown = self.parse_known_intermixed_args(words)
        arguments.unknown = [_with_value(option, words) for option in unknown if option.startswith("-")]
        arguments.options = self.long_options()
        return arguments


def refuse_unknown(arguments: argparse.Namespace, model: type[Section]) -> None:
    """Refuse the options that a command does not have, and suggest its options or settings of `model` in their place.

    Raises:
        ConfigError: there is at least one; a line for each shows how to write what was probably meant.
    """
    if arguments.unknown:
        raise ConfigError("\n".join(_about(words, arguments.options, model) for words in arguments.unknown))


def similar_key(name: str, model: type[Section]) -> str | None:
    """Return the dotted key that is most likely meant by `name`, or None where nothing is near.

    A key given in full, a last part that only one key has, another trainer's name, and a near spelling are tried in
    this order.
    """
    keys = dotted_keys(model)
    plain = name.lstrip("-").replace("-", "_")
    if plain in keys:
        return plain
    last = plain.rpartition(".")[2]
    same_end = [key for key in keys if key.rpartition(".")[2] == last]
    if len(same_end) == 1:
        return same_end[0]
    if (known := key_elsewhere(plain)) is not None:
        return known
    near = difflib.get_close_matches(plain, keys, n=1, cutoff=0.75)
    if near:
        return near[0]
    ends = difflib.get_close_matches(last, {key.rpartition(".")[2]: None for key in keys}, n=1, cutoff=0.75)
    matching = [key for key in keys if ends and key.rpartition(".")[2] == ends[0]]
    return matching[0] if len(matching) == 1 else None


def setting_without_equals(overrides: Sequence[str]) -> str | None:
    """Return a message about a setting typed as `key value`, `key = value` or `key: value`, or None if none is.

    Args:
        overrides: the words of the command line, each of which should be `key=value`.
    """
    for place, word in enumerate(overrides):
        after = list(overrides[place + 1 : place + 3])
        if "=" in word.strip("="):
            continue
        key, colon, value = word.partition(":")
        if colon and _is_key(key) and (value or after):
            return f"`{word}` is not of the form key.sub=value; write `{key}={value or after[0]}`"
        if word.endswith("=") and word != "=":
            continue
        if not _is_key(word):
            continue
        if after[:1] == ["="]:
            return f"`{' '.join([word, *after])}` is not of the form key.sub=value; leave out the blanks: " + (
                f"`{word}={''.join(after[1:])}`"
            )
        if after and after[0].startswith("="):
            return f"`{word} {after[0]}` is not of the form key.sub=value; leave out the blank: `{word}{after[0]}`"
        if after and "=" not in after[0]:
            return f"`{word} {after[0]}` is not of the form key.sub=value; write `{word}={after[0]}`"
    return None


def _is_key(word: str) -> bool:
    return all(part.isidentifier() or part.isdecimal() for part in word.split("."))


def _with_value(option: str, words: Sequence[str]) -> str:
    """Return the option, with the word after it where that may be its value."""
    places = [place for place, word in enumerate(words) if word == option]
    after = words[places[0] + 1] if places and places[0] + 1 < len(words) else ""
    has_value = bool(after) and "=" not in option and "=" not in after and not after.startswith("--")
    return f"{option} {after}" if has_value else option


def _about(words: str, options: Iterable[str], model: type[Section]) -> str:
    """Return the sentence about one option that the command does not have."""
    name, _, value = words.replace(" ", "=", 1).partition("=")
    start = f"{COMMAND_LINE}: `{words}` is no option of this command"
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.8)
    if near:
        return f"{start}; did you mean `{near[0]}`?"
    key = similar_key(name, model)
    if key is not None:
        written = key if "=" in key else f"{key}={value or '...'}"
        return f"{start}; settings are written key.sub=value: `{written}`"
    if (answer := answer_elsewhere(name)) is not None:
        return f"{start}: {answer}"
    return f"{start}; settings are written key.sub=value, and the options are {', '.join(options)}"
