"""The exceptions a user can act on, and how a command reports them.

A message says, in one sentence, where the trouble is, what was wanted, what was found and what to do.
Everything that is not one of these is our own bug and keeps its stack trace.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

SHOWN_DIGITS = 12
"""Number of a fingerprint's hexadecimal digits that messages show."""

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


class HookError(MegadiffError):
    """A hook or metric sink of the list `hooks` that failed, or that does what hooks must not do."""


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


_PATIENCE_S = 3.0
"""Seconds for which a rank other than the first leaves the report of a mistake to the first rank.

A mistake that every rank makes ends the first rank too, and the launcher then ends this one while it waits. A mistake
of this rank alone is reported when the time is over.
"""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and end the process as every command here ends.

    The exit code is 0 on success and that of a `MegadiffError`, whose message goes to stderr; it is 2 for a path that
    no file can have, such as one that is too long, and 130 when interrupted. Any other exception is a fault of this
    package and keeps its stack trace (exit code 1). Under a launcher that passes `TORCHELASTIC_ERROR_FILE`, as torchrun
    does, the message is also written there, so that the launcher's own summary shows it, and only one rank prints it.
    """
    try:
        main()
    except MegadiffError as error:
        _end(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if _is_own(error.name or ""):
            _write_error_file(f"{type(error).__name__}: {error}")
            raise
        _end(
            f"the package `{error.name}` is not installed for {sys.executable}; run `pip install -e .` with it, or use "
            "the Python of the project's virtual environment",
            MegadiffError.exit_code,
        )
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_PATH and error.filename is not None:
            _end(str(ConfigError(f"{error.filename}: {error.strerror}; check the path")), ConfigError.exit_code)
        _write_error_file(f"{type(error).__name__}: {error}")
        raise


def _is_own(module: str) -> bool:
    """Return whether a module that was not found should be part of this repository, or has no name."""
    return module.partition(".")[0] in ("", "megadiff", "tests", "tools")


def _end(message: str, code: int) -> NoReturn:
    """Report a message as the only rank that does, and exit."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        _wait_for_the_first_rank()
    _write_error_file(message)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _wait_for_the_first_rank() -> None:
    """Sleep on every rank but the first, for longer where another rank of the same node waits too."""
    patience_s = _PATIENCE_S * ((os.environ.get("RANK", "0") != "0") + (os.environ.get("LOCAL_RANK", "0") != "0"))
    if not patience_s:
        return
    with contextlib.suppress(ValueError):  # batch scripts let ranks ignore the signal with which the launcher ends them
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(patience_s)


def _write_error_file(message: str) -> None:
    """Write what torchrun's summary shows about this rank; a file that cannot be written costs the summary only.

    Source of the format: `torch.distributed.elastic.multiprocessing.errors.ErrorHandler.record_exception`.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    about = {"py_callstack": message, "timestamp": str(int(time.time()))}  # the summary prints the former
    try:
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": about}}, file)
        os.replace(f"{path}.tmp", path)
    except OSError:
        return
