"""The program `megadiff COMMAND [ARGUMENT ...]`, which is also `python -m megadiff COMMAND [ARGUMENT ...]`."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path

import megadiff.cli
from megadiff.errors import ConfigError, run_command


def main() -> None:
    """Run the command that the first word of the command line names."""
    run_command(_run)


def commands() -> list[str]:
    """Return the names of the commands, sorted, without importing any of them."""
    found = pkgutil.iter_modules(megadiff.cli.__path__)
    return sorted(module.name for module in found if not module.name.startswith("_"))


def summary(command: str) -> str:
    """Return the first paragraph of a command's docstring as one line, without importing the command."""
    spec = importlib.util.find_spec(f"megadiff.cli.{command}")
    assert spec is not None
    assert spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def _run() -> None:
    first, *rest = sys.argv[1:] or ["--help"]
    if first in ("-h", "--help"):
        print(_help())
    elif first == "--version":
        print(f"megadiff {megadiff.__version__}")
    else:
        command = _known(first)
        sys.argv = [f"megadiff {command}", *rest]  # the command's parser takes its name from here
        importlib.import_module(f"megadiff.cli.{command}").main()


def _known(word: str) -> str:
    """Return the command that a word names, with `-` or `_` between its parts.

    Raises:
        ConfigError: there is none.
    """
    known, name = commands(), word.replace("-", "_")
    if name in known:
        return name
    from megadiff.config.suggestions import did_you_mean

    is_option = word.startswith("-")
    near = did_you_mean(word, ["--help", "--version"]) if is_option else did_you_mean(name, known)
    what = "option" if is_option else "command"
    raise ConfigError(f"megadiff: unknown {what} `{word}`{near or '; `megadiff --help` lists the commands'}")


def _help() -> str:
    known = commands()
    width = max(map(len, known))
    return "\n".join(
        (
            "usage: megadiff [-h] [--version] COMMAND [ARGUMENT ...]\n",
            f"{megadiff.__doc__}\n",
            "commands:",
            *(f"  {command:{width}}  {summary(command)}" for command in known),
            "\n`megadiff COMMAND --help` shows a command's arguments and examples.",
        )
    )


if __name__ == "__main__":
    main()
