"""A consistent copy, in host memory, of the state that this rank has to write, taken between two steps.

megadiff's subclass of megatron-core's `FileSystemWriterAsync` plans as the parent does, but writes in a thread of its
own instead of in forked or spawned processes: those survive a killed trainer, and forking after CUDA or gloo have
started their threads is not safe. All names here belong to megatron-core 0.16.1, `dist_checkpointing/strategies`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
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
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.planner import WriteItemType

from megadiff.checkpoint.durable import entry_of, hashed_file
from megadiff.checkpoint.manifest import FileEntry
from megadiff.files import sync
from megadiff.parallel.pipeline import ModelChunk
from megadiff.parallel.topology import Topology
from megadiff.platform.machine import Platform

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
