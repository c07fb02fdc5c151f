"""Writer of a training checkpoint by one process from weights alone, tensor by tensor.

The torch_dist format is independent of the layout: each tensor's index records the location of its parts, so one file
written here can be loaded by any number of ranks. It holds no optimizer state.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megadiff.checkpoint.durable import entry_of
from megadiff.checkpoint.manifest import Manifest
from megadiff.export.weight_files import MODULES_WITH_EXTRA_STATE, TrainingTensor
from megadiff.files import sync

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Content of `metadata.json` as written by megatron-core 0.16."""

Fetch = Callable[[TrainingTensor], Tensor]


def write_training_checkpoint(
    folder: Path,
    tensors: Sequence[TrainingTensor],
    fetch: Fetch,
    *,
    dtypes: dict[str, torch.dtype],
    layers: int,
    manifest: Manifest,
) -> None:
    """Write a complete checkpoint, its manifest last, into the empty `folder`.

    Args:
        folder: an empty folder.
        tensors: tensors of the whole model, each block's separately.
        fetch: returns one of them, of its shape; called once for each, in any order; the result is freed once written.
        dtypes: type of each tensor, by key.
        layers: number of blocks.
        manifest: the manifest, whose `files` are filled in here.
    """
    parts = {(tensor.key, tensor.offset): tensor for tensor in tensors}
    items = [_tensor_item(tensor, dtypes[tensor.key], layers) for tensor in tensors]
    objects = [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
        for module in MODULES_WITH_EXTRA_STATE
        for layer in range(layers)
    ]
    items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects]
    writer = _Writer(folder, single_file_per_rank=True, thread_count=1)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan(items))])[0]
    results = writer.write_data(plan, _Lazy(parts, fetch)).value()
    writer.finish(Metadata(_index(tensors, dtypes, layers, objects)), [results])
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
    files = {path.name: entry_of(path) for path in sorted(folder.iterdir())}
    manifest.model_copy(update={"files": files}).write(folder)
    for path in folder.iterdir():
        sync(path)


def _tensor_item(tensor: TrainingTensor, dtype: torch.dtype, layers: int) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(tensor.offset), torch.Size(_stacked(tensor, 1)))
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(_stacked(tensor, layers)))
    return WriteItem(MetadataIndex(tensor.key, chunk.offsets, tensor.layer or 0), WriteItemType.SHARD, tensor_data=data)


def _stacked(tensor: TrainingTensor, layers: int) -> tuple[int, ...]:
    return tensor.shape if tensor.layer is None else (layers, *tensor.shape)


def _index(
    tensors: Sequence[TrainingTensor], dtypes: dict[str, torch.dtype], layers: int, objects: Sequence[str]
) -> dict[str, Any]:
    index: dict[str, Any] = {}
    for tensor in tensors:
        item = _tensor_item(tensor, dtypes[tensor.key], layers)
        assert item.tensor_data is not None
        found = index.setdefault(
            tensor.key, TensorStorageMetadata(item.tensor_data.properties, item.tensor_data.size, [])
        )
        found.chunks.append(item.tensor_data.chunk)
    return index | {name: BytesStorageMetadata() for name in objects}


class _Writer(FileSystemWriter):
    """Writer that omits the folder's path from the index: no index may name that class, and the folder is temporary."""

    def storage_meta(self) -> None:
        return None


class _Lazy(DefaultSavePlanner):
    """Planner that fetches each tensor only when torch's writer reaches it."""

    def __init__(self, parts: dict[tuple[str, tuple[int, ...]], TrainingTensor], fetch: Fetch) -> None:
        super().__init__()
        self._parts, self._fetch = parts, fetch

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)  # one object of one rank, as megatron-core lists them
            return nothing
        assert write_item.tensor_data is not None
        tensor = self._parts[write_item.index.fqn, tuple(write_item.tensor_data.chunk.offsets)]
        return self._fetch(tensor).view(write_item.tensor_data.chunk.sizes)
