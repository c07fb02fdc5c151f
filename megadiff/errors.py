"""The exceptions a user can act on, and how a command reports them.

A message says, in one sentence, where the trouble is, what was wanted, what was found and what to do.
Everything that is not one of these is our own bug and keeps its stack trace.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable
from typing import Any

_NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP)
_MAX_LINES, _HEAD, _TAIL = 200, 3000, 800
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class MegadiffError(Exception):
    """A mistake a user can correct; the command ends with its exit code, 2 for most, and the message alone.

    The message is kept printable and bounded, whatever a file gave it to quote: a line of more than a few thousand
    characters loses its middle, and control characters are written as escapes.
    """

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(_bounded(str(message)))


class ConfigError(MegadiffError):
    """A run description that cannot be: a wrong key, type, value or combination."""


class DataError(MegadiffError):
    """A corpus, tokenizer or indexed file that is missing, damaged or does not fit."""


class CheckpointError(MegadiffError):
    """A checkpoint that is missing, incomplete, or of another run."""


class StorageError(MegadiffError):
    """A disk that is full, slow or failing: nobody's mistake, and worth another try. Exit code 1."""

    exit_code = 1


class ShortageError(MegadiffError):
    """A rank whose device, or whose machine, ran out of memory; perhaps not the next time. Exit code 1."""

    exit_code = 1


class PlatformError(MegadiffError):
    """A machine or an installed library that cannot do what was asked."""


class TrainingError(MegadiffError):
    """A run that cannot go on, such as one whose loss is no longer finite."""

    exit_code = 5


def shown(value: Any, limit: int = 60) -> str:
    """Return a value that was found in a file as a message quotes it, of about `limit` characters at most."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value[: limit + 1]) if isinstance(value, str) else str(value)
    return text if len(text) <= limit + 2 else f"{text[:limit]}..."


def _bounded(message: str) -> str:
    """The message without its excess and with control characters escaped; its lines stay lines."""
    kept = message.split("\n", _MAX_LINES)[:_MAX_LINES]
    cut = [
        line if len(line) <= _HEAD + _TAIL else f"{line[:_HEAD]} ... [{len(line):,} characters] ... {line[-_TAIL:]}"
        for line in kept
    ]
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], "\n".join(cut))


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and end the process as every command here ends.

    Exit code 0 on success; that of a `MegadiffError` with its one message on stderr; 2 with one message for a path that
    no file can have, such as one that is too long; 130 when interrupted; any other
    exception is our own fault and propagates with its stack trace (exit code 1).
    """
    try:
        main()
    except MegadiffError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in _NO_PATH or error.filename is None:
            raise
        print(f"error: {ConfigError(f'{error.filename}: {error.strerror}; check the path')}", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
