"""The exceptions a user can act on, and how a command reports them.

A message says, in one sentence, where the trouble is, what was wanted, what was found and what to do.
Everything that is not one of these is our own bug and keeps its stack trace.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


class MegadiffError(Exception):
    """A mistake a user can mend; the command ends with exit code 2 and the message alone."""


class ConfigError(MegadiffError):
    """A run description that cannot be: a wrong key, type, value or combination."""


class DataError(MegadiffError):
    """A corpus, tokenizer or indexed file that is missing, damaged or does not fit."""


class CheckpointError(MegadiffError):
    """A checkpoint that is missing, incomplete, or of another run."""


class PlatformError(MegadiffError):
    """A machine or an installed library that cannot do what was asked."""


class TrainingError(MegadiffError):
    """A run that cannot go on, such as one whose loss is no longer finite."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and end the process as every command here ends.

    Exit code 0 on success, 2 with one message on stderr for a `MegadiffError`, 130 when interrupted; any other
    exception is our own fault and propagates with its stack trace (exit code 1).
    """
    try:
        main()
    except MegadiffError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
