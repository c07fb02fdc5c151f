"""Failures of one rank or of a library, told to every rank as one sentence, so that none waits for another for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megadiff.errors import CheckpointError, MegadiffError, StorageError
from megadiff.parallel.topology import Topology

_OF_DAMAGED_FILES = (ValueError, TypeError, KeyError, ArithmeticError)
"""What the library lets through of a small file that holds something else than it should."""


@contextmanager
def library_failures(what: str) -> Iterator[None]:
    """Say an exception of the library in one sentence; some are BaseExceptions (`CheckpointException`).

    Raises:
        CheckpointError: for any of them.
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
        CheckpointError, StorageError: with the main rank's words.
    """
    failure: MegadiffError | None = None
    try:
        yield
    except (CheckpointError, StorageError) as error:
        failure = error
    except OSError as error:
        failure = StorageError(f"{what} failed: {error.strerror or error}")
    said = topology.from_main((str(failure), isinstance(failure, StorageError)) if failure is not None else None)
    if said is not None:
        raise (StorageError if said[1] else CheckpointError)(said[0])


def every_rank_reports(problem: str | None, topology: Topology) -> str | None:
    """The first rank's problem, on every rank. Collective over the world."""
    found = topology.gather_to_main(problem)
    return topology.from_main(next((one for one in found or [] if one is not None), None))
