"""Save in the background: a snapshot in memory, shards on disk, a manifest, one rename.

A step folder appears complete or not at all: shards are written and synced under a staging name, then the index, then
the manifest with every file's hash, then comes the rename. A run killed before the rename still has its older
checkpoints.

megadiff's subclass of megatron-core's `FileSystemWriterAsync` plans as the parent does, but writes in a thread of its
own instead of in forked or spawned processes: those survive a killed trainer, and forking after CUDA or gloo have
started their threads is not safe. Its names are those of megatron-core 0.16.1, `dist_checkpointing/strategies`.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.planner import WriteItemType

from megadiff.checkpoint.folder import (
    clear_staging,
    delete,
    entry_of,
    hashed_file,
    is_foreign,
    prune,
    staging_folder,
    step_folder,
    verify_files,
)
from megadiff.checkpoint.manifest import FILE_NAME, SUM_NAME, FileEntry, Manifest
from megadiff.errors import CheckpointError, MegadiffError, StorageError
from megadiff.files import sync, write_atomically
from megadiff.parallel.pipeline import ModelChunk
from megadiff.parallel.topology import Topology
from megadiff.platform.machine import Platform
from megadiff.platform.quiet import quiet

log = logging.getLogger("megadiff")

COMMON_FILE = "common.pt"
"""Name, given by megatron-core, of the file with unsharded state such as the optimizer's parameter groups."""

_SHARDING = {
    # The default (`fully_sharded_model_space`) cannot be saved: "ShardedTensor.flattened_range is not supported".
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


class SavableOptimizer(Protocol):
    """The methods of an optimizer that checkpoints need."""

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool, metadata: dict[str, Any]) -> Any:
        """Return the state as shards."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Load a state."""
        ...


class HostBuffers:
    """Host memory for snapshots, reused from one save to the next; it is pinned if there is a GPU."""

    def __init__(self, platform: Platform) -> None:
        self._is_pinned = not platform.is_cpu
        self._kept: dict[int, Tensor] = {}

    def copy(self, place: int, tensor: Tensor) -> Tensor:
        """Copy `tensor` into the buffer number `place`; the copy is complete after `platform.synchronize()`."""
        kept = self._kept.get(place)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._is_pinned)
            self._kept[place] = kept
        return kept.copy_(tensor, non_blocking=True)


class _HostWriter(FileSystemWriterAsync):
    """A writer that copies this rank's part of the plan into host buffers, instead of cloning views and sharing the
    rest."""

    def __init__(self, folder: Path, buffers: HostBuffers) -> None:
        super().__init__(str(folder), thread_count=1)
        self._buffers = buffers
        self.file_name = ""
        self.items: list[tuple[Any, io.BytesIO | Tensor]] = []

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        """Resolve the small objects first, then copy the tensors, in the plan's order."""
        self.file_name = f"{plan.storage_data.prefix}0.distcp"
        objects = [item for item in plan.items if item.type == WriteItemType.BYTE_IO]
        tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        self.items = [(item, planner.resolve_data(item)) for item in objects]
        self.items += [
            (item, self._buffers.copy(place, planner.resolve_data(item).detach())) for place, item in enumerate(tensors)
        ]


@dataclass(frozen=True)
class Written:
    """The files that one rank has written."""

    files: dict[str, FileEntry]
    results: list[Any]
    """torch's `WriteResult`s, with the place of each tensor."""


@dataclass(frozen=True)
class Snapshot:
    """The state that this rank writes; it does not change when training continues."""

    folder: Path
    common: bytes | None
    """Serialised unsharded state on the main rank, None on the others."""
    _writer: _HostWriter
    _index: Any
    """torch's `Metadata` of all ranks' plans on the main rank, None on the others."""

    def write(self) -> Written:
        """Write this rank's files and wait until they are on the disk. Safe in a thread, without collectives.

        Raises:
            OSError: the disk is full or gone.
        """
        files: dict[str, FileEntry] = {}
        results: list[Any] = []
        if self.common is not None:
            with hashed_file(self.folder / COMMON_FILE) as file:
                file.write(self.common)
            files[COMMON_FILE] = file.entry()
        if self._writer.items:
            with hashed_file(self.folder / self._writer.file_name) as file:
                for item, data in self._writer.items:
                    results.append(
                        _write_item(
                            _StorageWriterTransforms(),
                            cast(Any, file),
                            data,
                            item,
                            self._writer.file_name,
                            SerializationFormat.TORCH_SAVE,
                        )
                    )
            files[self._writer.file_name] = file.entry()
        return Written(files, results)

    def write_index(self, results: Sequence[list[Any]]) -> dict[str, FileEntry]:
        """Write the index of all ranks' shards and the name of the format; for the main rank only.

        Raises:
            OSError: the disk is full or gone.
        """
        self._writer.finish(self._index, list(results))
        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
        files = {}
        for name in (".metadata", "metadata.json"):
            sync(self.folder / name)
            files[name] = entry_of(self.folder / name)
        return files


def take_snapshot(
    folder: Path,
    chunks: Sequence[ModelChunk],
    optimizer: SavableOptimizer,
    *,
    buffers: HostBuffers,
    check_sharding: bool,
    topology: Topology,
    platform: Platform,
) -> Snapshot:
    """Plan a save into the empty `folder` and copy what this rank has to write. Collective over the world; writes
    nothing.

    Args:
        chunks: the bare model chunks, not their data-parallel wrappers.
        buffers: host memory, which must not hold an earlier snapshot that is still being written.
        check_sharding: whether megatron-core checks that every tensor is written exactly once; needed once per process.
    """
    state, metadata = sharded_state(chunks, optimizer, topology, is_loading=False)
    state["content_metadata"] = {key: value for key, value in metadata.items() if key != "dp_cp_group"}
    sharded, common = save_preprocess(state, check_sharding)
    _share_out(cast(dict[str, Any], sharded), topology)
    sharded, _, _ = _replace_state_dict_keys_with_sharded_keys(cast(dict[str, Any], sharded), True)
    writer = _HostWriter(folder, buffers)
    (_, index, _), *_ = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(sharded, False),
        writer,
        topology.host_group,
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    if index is not None:
        # It serves only a plan cache that is not used here, and is as large as the index itself.
        delattr(index, "all_local_plans")
    platform.synchronize()
    return Snapshot(folder, _serialised(common) if topology.is_main else None, writer, index)


def _share_out(sharded: dict[str, Any], topology: Topology) -> None:
    """Distribute the writing of shards that all data-parallel ranks hold; otherwise the first rank would write them
    all."""
    if topology.layout.data > 1:
        strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy("torch_dist", 1), topology.data_group)
        strategy.apply_saving_parallelization(sharded)


def sharded_state(
    chunks: Sequence[ModelChunk], optimizer: SavableOptimizer | None, topology: Topology, *, is_loading: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state as shards, with keys that are independent of the layout, and the way the optimizer's are
    sharded."""
    metadata = {**_SHARDING, "dp_cp_group": topology.data_group}
    state: dict[str, Any] = {
        model_key(index, chunks): chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        models = dict(state)
        model_state = models if len(chunks) > 1 else models["model"]
        state["optimizer"] = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    return state, metadata


def model_key(index: int, chunks: Sequence[ModelChunk]) -> str:
    """Return the name of a model chunk in the state."""
    return f"model{index}" if len(chunks) > 1 else "model"


def _serialised(common: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(common, buffer)
    return buffer.getvalue()


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
