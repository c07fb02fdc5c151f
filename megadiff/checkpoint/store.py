"""Checkpoints on disk: `checkpoints/step_XXXXXXXX` in the run folder, completed by one rename.

Sharded files are megatron-core's `torch_dist` format, whose keys know no layout, so any layout loads them.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megadiff.checkpoint.manifest import FILE_NAME, FileEntry, Manifest, read_manifest
from megadiff.checkpoint.safe_metadata import refuse_hostile_metadata, unpickle_plain_objects_only
from megadiff.errors import CheckpointError
from megadiff.parallel.topology import Topology
from megadiff.platform.machine import Platform
from megadiff.platform.quiet import quiet

_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_SHARDING = {
    # The default (`fully_sharded_model_space`) cannot be saved: "ShardedTensor.flattened_range is not supported".
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


class SavableOptimizer(Protocol):
    """What a checkpoint needs of an optimizer."""

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool, metadata: dict[str, Any]) -> Any:
        """State as shards."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Take over a loaded state."""
        ...


def save(
    run_folder: Path,
    manifest: Manifest,
    chunks: Sequence[Any],
    optimizer: SavableOptimizer,
    *,
    topology: Topology,
    platform: Platform,
) -> Path:
    """Write `checkpoints/step_XXXXXXXX` in the run folder and name it in `LATEST`. Collective over the world.

    Killed at any moment, it leaves either no folder of that name or a whole one.

    Args:
        chunks: the bare model chunks, not their data-parallel wrappers.

    Raises:
        CheckpointError: the folder cannot be written; older checkpoints are untouched.
    """
    final = run_folder / "checkpoints" / f"step_{manifest.step:08d}"
    staging = final.with_name(f".{final.name}.tmp")
    with _main_rank_reports(f"writing {final}"):
        if topology.is_main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
    with _failures_as(CheckpointError, f"writing {final} failed"), platform.scope(), quiet():
        state, metadata = _sharded_state(chunks, optimizer, topology, is_loading=False)
        _keep_results_in_this_process()
        dist_checkpointing.save(
            state,
            str(staging),
            sharded_strategy=TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
            content_metadata={key: value for key, value in metadata.items() if key != "dp_cp_group"},
        )
    with _main_rank_reports(f"completing {final}"):
        if topology.is_main:
            _complete(staging, final, manifest)
            _write_atomically(run_folder / "LATEST", final.name)
    return final


def load(
    folder: Path,
    chunks: Sequence[Any],
    optimizer: SavableOptimizer | None,
    *,
    topology: Topology,
    platform: Platform,
) -> None:
    """Load weights, and the optimizer's state if given, from a checkpoint of any layout. Collective over the world.

    Raises:
        CheckpointError: a file is missing, damaged or hostile, or holds a model of another shape.
    """
    with _main_rank_reports(f"reading {folder}"):
        if topology.is_main:
            verify_files(folder, hashes=True)
            refuse_hostile_metadata(folder)
    with _failures_as(CheckpointError, f"{folder} does not fit this model"), platform.scope(), quiet():
        state, _ = _sharded_state(chunks, optimizer, topology, is_loading=True)
        with unpickle_plain_objects_only():
            loaded = cast(dict[str, Any], dist_checkpointing.load(state, str(folder)))
        for index, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[_model_key(index, chunks)])
        if optimizer is not None:
            optimizer.load_state_dict(loaded["optimizer"])


def newest_complete(run_folder: Path) -> Path | None:
    """The newest checkpoint of a run whose files all have the sizes its manifest says; None if there is none.

    `LATEST` is a hint for people and is not asked.

    Raises:
        CheckpointError: there are checkpoints and none is whole; a run must not start again over them unasked.
    """
    folders = _step_folders(run_folder / "checkpoints")
    found = next((folder for folder in folders if _is_complete(folder)), None)
    if found is None and folders:
        raise CheckpointError(
            f"{run_folder / 'checkpoints'} holds {len(folders)} checkpoint(s) and all are damaged (the newest is "
            f"{folders[0].name}); move them away to start the run again, or give it another `name`"
        )
    return found


def damaged(run_folder: Path) -> list[Path]:
    """Step folders that are no whole checkpoints, newest first."""
    return [folder for folder in _step_folders(run_folder / "checkpoints") if not _is_complete(folder)]


def prune(run_folder: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints (0 keeps all), and staging left by a killed save."""
    root = run_folder / "checkpoints"
    for stale in root.glob(".step_*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    complete = [folder for folder in _step_folders(root) if _is_complete(folder)]
    for folder in complete[keep:] if keep else []:
        # The manifest goes first: a half-deleted folder must never look complete.
        (folder / FILE_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def verify_files(folder: Path, *, hashes: bool) -> Manifest:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: a file is missing, or of another size or content than was written.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing; take another checkpoint of the run")
        if path.stat().st_size != entry.bytes:
            raise CheckpointError(
                f"{path} is damaged: {path.stat().st_size} bytes instead of {entry.bytes}; take another checkpoint"
            )
        if hashes and _sha256(path) != entry.sha256:
            raise CheckpointError(f"{path} is damaged: its content has changed since it was written; take another one")
    return manifest


def _keep_results_in_this_process() -> None:
    """Saves here are in the foreground, so the queue of write results needs no process of its own.

    megatron-core's is a spawned Manager in every rank (filesystem_async.py:55): five seconds at the first save, 270 MB,
    and a killed trainer leaves it behind for ever, holding the terminal's or torchrun's pipes open.
    """
    assert hasattr(filesystem_async, "_results_queue"), "megatron-core has moved its queue of write results"
    filesystem_async._results_queue = queue.SimpleQueue()


def _sharded_state(
    chunks: Sequence[Any], optimizer: SavableOptimizer | None, topology: Topology, *, is_loading: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    metadata = {**_SHARDING, "dp_cp_group": topology.data_group}
    state: dict[str, Any] = {
        _model_key(index, chunks): chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        models = dict(state)
        model_state = models if len(chunks) > 1 else models["model"]
        state["optimizer"] = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    return state, metadata


def _model_key(index: int, chunks: Sequence[Any]) -> str:
    return f"model{index}" if len(chunks) > 1 else "model"


def _complete(staging: Path, final: Path, manifest: Manifest) -> None:
    """List and checksum what was written, write the manifest, rename, and make each step durable."""
    entries = {}
    for path in sorted(staging.iterdir()):
        digest = _sha256(path)
        entries[path.name] = FileEntry(bytes=path.stat().st_size, sha256=digest)
        _sync(path)
    manifest.model_copy(update={"files": entries}).write(staging)
    _sync(staging / FILE_NAME)
    _sync(staging)
    if final.exists():  # a damaged folder of that name, or one written before a resume from an older step
        (final / FILE_NAME).unlink(missing_ok=True)
        shutil.rmtree(final)
    staging.rename(final)
    _sync(final.parent)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _step_folders(root: Path) -> list[Path]:
    """Step folders, newest step first."""
    found = [(int(match[1]), path) for path in root.glob("step_*") if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _is_complete(folder: Path) -> bool:
    try:
        verify_files(folder, hashes=False)
    except CheckpointError:
        return False
    return True


@contextmanager
def _failures_as(kind: type[CheckpointError], what: str) -> Iterator[None]:
    """Say an exception of the library in one sentence; some are BaseExceptions (`CheckpointException`)."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (CheckpointingException, CheckpointException, OSError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise kind(f"{what}: {lines[-1] if lines else type(error).__name__}") from error


@contextmanager
def _main_rank_reports(what: str) -> Iterator[None]:
    """Run a block in which only the main rank works; if it fails there, every rank raises the same error."""
    failure: list[str | None] = [None]
    try:
        yield
    except (CheckpointError, OSError) as error:
        failure[0] = str(error) if isinstance(error, CheckpointError) else f"{what} failed: {error}"
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise CheckpointError(failure[0])
