"""The exceptions that a user can act on, and how a command reports them.

A message states, in one sentence, where the problem is, what was expected, what was found and what to do.
Any other exception is a bug of this package and keeps its stack trace.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

SHOWN_DIGITS = 12
"""Number of hexadecimal digits of a fingerprint that messages show."""

_NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP)
_MAX_LINES, _HEAD, _TAIL = 200, 3000, 800
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_PATIENCE_S = 3.0
"""Seconds that a rank other than the first waits, so that the first rank can report the mistake.

A mistake that every rank makes also ends the first rank, and the launcher then ends this one while it waits. A mistake
of this rank alone is reported when the time is over.
"""


class MegadiffError(Exception):
    """A mistake that the user can correct; the command exits with its exit code, mostly 2, and prints only the message.

    The message is kept printable and bounded whatever it quotes from a file: a line of more than a few thousand
    characters is shortened in the middle, and control characters are escaped.
    """

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(_bounded(str(message)))


class ConfigError(MegadiffError):
    """An invalid configuration: a wrong key, type, value or combination."""


class DataError(MegadiffError):
    """A corpus, tokenizer or indexed file that is missing, damaged or does not fit."""


class CheckpointError(MegadiffError):
    """A checkpoint that is missing, incomplete, or of another run."""


class StorageError(MegadiffError):
    """A disk that is full, slow or failing: not the user's mistake, and worth a retry. Exit code 1."""

    exit_code = 1


class ShortageError(MegadiffError):
    """A device or host that ran out of memory; a retry may succeed. Exit code 1."""

    exit_code = 1


class PlatformError(MegadiffError):
    """A machine or an installed library that lacks what was requested."""


class TrainingError(MegadiffError):
    """A run that cannot continue, such as one whose loss is no longer finite."""

    exit_code = 5


class HookError(MegadiffError):
    """A hook or metric sink of the list `hooks` that failed, or that does what hooks must not do."""


def shown(value: Any, limit: int = 60) -> str:
    """Return a value found in a file as messages quote it, in about `limit` characters at most."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value[: limit + 1]) if isinstance(value, str) else str(value)
    return text if len(text) <= limit + 2 else f"{text[:limit]}..."


def _bounded(message: str) -> str:
    """Return the message shortened and with control characters escaped; line breaks are kept."""
    kept = message.split("\n", _MAX_LINES)[:_MAX_LINES]
    cut = [
        line if len(line) <= _HEAD + _TAIL else f"{line[:_HEAD]} ... [{len(line):,} characters] ... {line[-_TAIL:]}"
        for line in kept
    ]
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], "\n".join(cut))


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and end the process as every command of this package does.

    The exit code is 0 on success and that of a `MegadiffError`, whose message goes to stderr; it is 2 for a path that
    no file can have, such as one that is too long, 130 when interrupted, and 141 when the reader of the output, such as
    `head`, has left. Any other exception is a bug of this package and keeps its stack trace (exit code 1). Under a
    launcher that passes `TORCHELASTIC_ERROR_FILE`, as torchrun does, the message is also written there, so that the
    launcher's own summary shows it, and only one rank prints it.
    """
    try:
        main()
        sys.stdout.flush()
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
        if isinstance(error, BrokenPipeError) and _has_output_no_reader():
            sys.exit(141)  # as a program ends that SIGPIPE kills
        if isinstance(error, OSError) and error.errno in _NO_PATH and error.filename is not None:
            _end(str(ConfigError(f"{error.filename}: {error.strerror}; check the path")), ConfigError.exit_code)
        _write_error_file(f"{type(error).__name__}: {error}")
        raise


def _has_output_no_reader() -> bool:
    """Return whether the reader of stdout has left; what could not be written is then dropped."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
    return True


def _is_own(module: str) -> bool:
    """Return whether a module that was not found should be part of this repository, or has no name."""
    return module.partition(".")[0] in ("", "megadiff", "tests", "tools")


def _end(message: str, code: int) -> NoReturn:
    """Report a message, from one rank alone, and exit."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        _wait_for_the_first_rank()
    _write_error_file(message)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _wait_for_the_first_rank() -> None:
    """Sleep on every rank but the first, and longer if another rank of the same node waits too."""
    patience_s = _PATIENCE_S * ((os.environ.get("RANK", "0") != "0") + (os.environ.get("LOCAL_RANK", "0") != "0"))
    if not patience_s:
        return
    with contextlib.suppress(ValueError):  # batch scripts make ranks ignore SIGTERM, with which the launcher ends them
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(patience_s)


def _write_error_file(message: str) -> None:
    """Write the error file that torchrun's summary shows for this rank; failing to write it only costs the summary.

    Source of the format: `torch.distributed.elastic.multiprocessing.errors.ErrorHandler.record_exception`.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    about = {"py_callstack": message, "timestamp": str(int(time.time()))}  # the summary prints py_callstack
    try:
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": about}}, file)
        os.replace(f"{path}.tmp", path)
    except OSError:
        return
