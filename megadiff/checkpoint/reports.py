"""Failures of one rank or of a library, reported to every rank, so that no rank waits for another forever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megadiff.errors import CheckpointError, MegadiffError, StorageError
from megadiff.parallel.topology import Topology

_OF_DAMAGED_FILES = (ValueError, TypeError, KeyError, ArithmeticError)
"""Exceptions that the library passes on when a small file does not contain what it should."""


@contextmanager
def library_failures(what: str) -> Iterator[None]:
    """Replace an exception of the library by a one-sentence error; some are BaseExceptions (`CheckpointException`).

    Raises:
        CheckpointError: in place of any of them.
    """
    try:
        yield
    except (CheckpointingException, CheckpointException, OSError, RuntimeError, *_OF_DAMAGED_FILES) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f"{what}: {lines[-1] if lines else type(error).__name__}") from error


@contextmanager
def main_rank_reports(what: str, topology: Topology) -> Iterator[None]:
    """Run a block in which only the main rank works; if it fails there, every rank raises the same error.

    Raises:
        CheckpointError, StorageError: with the main rank's message.
    """
    failure: MegadiffError | None = None
    try:
        yield
    except (CheckpointError, StorageError) as error:
        failure = error
    except OSError as error:
        failure = StorageError(f"{what} failed: {error.strerror or error}")
    message = topology.from_main((str(failure), isinstance(failure, StorageError)) if failure is not None else None)
    if message is not None:
        raise (StorageError if message[1] else CheckpointError)(message[0])


def every_rank_reports(problem: str | None, topology: Topology) -> str | None:
    """Return the problem of the first rank that has one, on every rank. Collective over the world."""
    found = topology.gather_to_main(problem)
    return topology.from_main(next((one for one in found or [] if one is not None), None))
