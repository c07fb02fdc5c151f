"""Reader of parts of tensors from a training checkpoint's shards, for any layout, without running any code in them.

Only torch's own reader accesses the shards, and it loads tensors alone (`weights_only`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megadiff.checkpoint.safe_metadata import read_index, unpickle_plain_objects_only
from megadiff.errors import CheckpointError


class StoredTensors:
    """The tensors of one checkpoint folder; holds its index and no data."""

    def __init__(self, folder: Path) -> None:
        """Read the index.

        Raises:
            CheckpointError: it is missing, damaged, or names anything but the parts of an index.
        """
        index = read_index(folder)
        self.folder = folder
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(index, is_coordinator=True)
        self._tensors = {
            key: found for key, found in index.state_dict_metadata.items() if isinstance(found, TensorStorageMetadata)
        }

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the full shape of a tensor, with the dimension of the blocks first if it has one."""
        return tuple(self._found(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Return the type in which a tensor is stored."""
        return self._found(key).properties.dtype

    def read(self, key: str, offset: tuple[int, ...], size: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        """Return the part [offset, offset + size) of a tensor, in `dtype`; needs memory for it and one stored chunk.

        Raises:
            CheckpointError: there is no such tensor, the part is not completely stored, or a shard is damaged.
        """
        out = torch.empty(size, dtype=dtype)
        wanted = ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
        items = create_read_items_for_chunk_list(key, self._found(key), [wanted])
        if sum(math.prod(item.lengths) for item in items) != out.numel():
            raise CheckpointError(f"{self.folder} does not hold all of {key}; take another checkpoint of the run")
        try:
            with unpickle_plain_objects_only():
                self._reader.read_data(LoadPlan(items), _Into(out)).wait()
        except (OSError, RuntimeError, AssertionError, EOFError) as error:
            last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise CheckpointError(f"{self.folder}: {key} cannot be read ({last[0]}); take another checkpoint") from None
        return out

    def _found(self, key: str) -> TensorStorageMetadata:
        if key not in self._tensors:
            raise CheckpointError(
                f"{self.folder} holds no tensor {key}, which its model has; it was written by another version, or by "
                "another program"
            )
        return self._tensors[key]


class _Into(DefaultLoadPlanner):
    """Planner that reads into one tensor; the copy casts."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self._out = out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._out
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Any) -> None:
        """Do nothing: the tensor is a view of the target."""
