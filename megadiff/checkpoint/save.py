"""Save in the background: a snapshot in memory, shards on disk, a manifest, one rename.

A step folder appears complete or not at all: shards are written and synced under a staging name, then the index, then
the manifest with every file's hash, then comes the rename. A run killed before the rename still has its older
checkpoints.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megadiff.checkpoint.folder import (
    clear_staging,
    delete,
    is_foreign,
    prune,
    staging_folder,
    step_folder,
    verify_files,
)
from megadiff.checkpoint.manifest import FILE_NAME, SUM_NAME, FileEntry, Manifest
from megadiff.checkpoint.snapshot import HostBuffers, SavableOptimizer, Snapshot, Written, take_snapshot
from megadiff.errors import CheckpointError, MegadiffError, StorageError
from megadiff.files import sync, write_atomically
from megadiff.parallel.pipeline import ModelChunk
from megadiff.parallel.topology import Topology
from megadiff.platform.machine import Platform
from megadiff.platform.quiet import quiet

_OF_DAMAGED_FILES = (ValueError, TypeError, KeyError, ArithmeticError)
"""Exceptions that the library passes on when a small file does not contain what it should."""

log = logging.getLogger("megadiff")


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


@dataclass(frozen=True)
class SaveResult:
    """The end of one save."""

    step: int
    folder: Path
    error: str | None
    """Reason why there is no such checkpoint, in one sentence; None if there is one."""
    stall_s: float
    """Seconds for which training on this rank paused for it."""
    seconds: float
    """Seconds from the start of the save until it was complete."""


class _Write(threading.Thread):
    """A thread that writes one rank's files while training continues."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(name="checkpoint writer", daemon=True)
        self._snapshot = snapshot
        self.written: Written | None = None
        self.error: str | None = None

    def run(self) -> None:
        try:
            self.written = self._snapshot.write()
        except OSError as error:
            self.error = f"{error.strerror or error} ({self._snapshot.folder})"
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"


@dataclass
class _Underway:
    """A save between its snapshot and its rename."""

    manifest: Manifest
    final: Path
    snapshot: Snapshot
    writing: _Write
    started: float
    stall_s: float


class AsyncCheckpointer:
    """Writer of the checkpoints of one run, one at a time. Every method is collective over the world."""

    def __init__(
        self,
        run_folder: Path,
        chunks: Sequence[ModelChunk],
        optimizer: SavableOptimizer,
        *,
        keep: int,
        before_cooldown: int | None = None,
        topology: Topology,
        platform: Platform,
    ) -> None:
        """Store the settings.

        Args:
            chunks: the bare model chunks, not their data-parallel wrappers.
            keep, before_cooldown: the arguments of `prune`.
        """
        self._run_folder = run_folder
        self._kept: dict[str, Any] = {"keep": keep, "before_cooldown": before_cooldown}
        self._chunks, self._optimizer = chunks, optimizer
        self._topology, self._platform = topology, platform
        self._buffers = HostBuffers(platform)
        self._is_checked = False
        self._underway: _Underway | None = None
        self._pruning: threading.Thread | None = None

    def start(self, manifest: Manifest, *, first: Callable[[], None] = lambda: None) -> SaveResult | None:
        """Copy the state to host memory and begin to write it as `checkpoints/step_XXXXXXXX`.

        No other save may be running. The outcome is returned only if the save fails at once, for example on a full
        disk.

        Args:
            first: called on the main rank to make durable what a checkpoint relies on; if it raises an OSError, there
                is
                no checkpoint.
        """
        assert self._underway is None, "finish the save under way first"
        began = time.monotonic()
        final = step_folder(self._run_folder, manifest.step)
        snapshot, error = None, None
        try:
            with main_rank_reports(f"writing {final}", self._topology):
                if self._topology.is_main:
                    self._wait_for_pruning()
                    first()
                    self._refuse_link(final)
                    clear_staging(self._run_folder)
                    staging_folder(final).mkdir(parents=True)
            with library_failures(f"writing {final} failed"), self._platform.scope(), quiet():
                snapshot = take_snapshot(
                    staging_folder(final),
                    self._chunks,
                    self._optimizer,
                    buffers=self._buffers,
                    check_sharding=not self._is_checked,
                    topology=self._topology,
                    platform=self._platform,
                )
        except (CheckpointError, StorageError) as failure:
            error = str(failure)
        # One rank may have run out of memory: either all ranks abandon this save, or none.
        error = every_rank_reports(error, self._topology)
        if error is not None or snapshot is None:
            stall = time.monotonic() - began
            return SaveResult(manifest.step, final, error, stall, stall)
        self._is_checked = True
        writing = _Write(snapshot)
        writing.start()
        self._underway = _Underway(manifest, final, snapshot, writing, began, time.monotonic() - began)
        return None

    def poll(self) -> SaveResult | None:
        """Complete the save under way once every rank has written its part; None before that, or without one."""
        if self._underway is None:
            return None
        began = time.monotonic()
        is_waiting = self._topology.largest(int(self._underway.writing.is_alive()))
        self._underway.stall_s += time.monotonic() - began
        return None if is_waiting else self.finish()

    def finish(self) -> SaveResult | None:
        """Wait for the save under way and complete it; None if there is none."""
        if self._underway is None:
            return None
        save, self._underway = self._underway, None
        began = time.monotonic()
        save.writing.join()
        parts = self._topology.gather_to_main((save.writing.written, save.writing.error))
        error = None
        try:
            with main_rank_reports(f"completing {save.final}", self._topology):
                if self._topology.is_main:
                    assert parts is not None
                    self._complete(save, parts)
        except (CheckpointError, StorageError) as failure:
            error = str(failure)
            if self._topology.is_main:
                shutil.rmtree(staging_folder(save.final), ignore_errors=True)
        now = time.monotonic()
        return SaveResult(save.manifest.step, save.final, error, save.stall_s + now - began, now - save.started)

    def _refuse_link(self, final: Path) -> None:
        """Refuse to replace a folder that is stored elsewhere; called before anything is written."""
        if os.path.lexists(final) and is_foreign(final):
            raise CheckpointError(
                f"{final} is, or holds, a link and is not replaced; remove it from the run folder to have it saved"
            )

    def _wait_for_pruning(self) -> None:
        if self._pruning is not None:
            self._pruning.join()
            self._pruning = None

    def _prune(self) -> None:
        try:
            prune(self._run_folder, **self._kept)
        except (OSError, CheckpointError, StorageError) as error:
            log.warning(f"older checkpoints of {self._run_folder} were not deleted: {error}")

    def _complete(self, save: _Underway, parts: list[tuple[Written | None, str | None]]) -> None:
        """Write index and manifest and rename, each made durable, then delete older ones; called on the main rank."""
        for rank, (_, error) in enumerate(parts):
            if error is not None:
                raise CheckpointError(f"writing {save.final} failed on rank {rank}: {error}")
        staging = staging_folder(save.final)
        files: dict[str, FileEntry] = {}
        results = []
        for written, _ in parts:
            assert written is not None
            files |= written.files
            results.append(written.results)
        with library_failures(f"completing {save.final} failed"):
            files |= save.snapshot.write_index(results)
        save.manifest.model_copy(update={"files": files}).write(staging)
        for path in (staging / FILE_NAME, staging / SUM_NAME, staging):
            sync(path)
        if save.final.exists():  # a damaged folder of that name, or one written before a resume from an older step
            delete(save.final)
        staging.rename(save.final)
        sync(save.final.parent)
        verify_files(save.final, hashes=False)
        write_atomically(self._run_folder / "LATEST", save.final.name + "\n")
        # Deleting takes as long as copying. This is no daemon thread: no run ends with a half-deleted checkpoint.
        self._pruning = threading.Thread(target=self._prune)
        self._pruning.start()
