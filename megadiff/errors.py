"""The exceptions a user can act on, and how a command reports them.

A message says, in one sentence, where the trouble is, what was wanted, what was found and what to do.
Everything that is not one of these is our own bug and keeps its stack trace.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


class MegadiffError(Exception):
    """A mistake a user can mend; the command ends with its exit code, 2 for most, and the message alone."""

    exit_code = 2


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


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and end the process as every command here ends.

    Exit code 0 on success; that of a `MegadiffError` with its one message on stderr; 130 when interrupted; any other
    exception is our own fault and propagates with its stack trace (exit code 1).
    """
    try:
        main()
    except MegadiffError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
