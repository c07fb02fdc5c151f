"""The pickled index of a torch_dist checkpoint, read so that it cannot run code.

torch's `FileSystemReader.read_metadata` calls `pickle.load` on `.metadata`
(torch/distributed/checkpoint/filesystem.py), so a hostile folder runs code on load. `refuse_hostile_metadata` reads
the same bytes first with an unpickler that knows only the classes such an index is made of.
"""

from __future__ import annotations

import pickle  # noqa: TID251  only to subclass Unpickler with an allow-list
from pathlib import Path
from typing import Any

from megadiff.errors import CheckpointError

_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED = {
    *((f"{_CHECKPOINT}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_CHECKPOINT}.metadata", f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    *((f"{_CHECKPOINT}.planner", name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")),
}
"""Everything the index of a megatron-core 0.16 checkpoint names, and no more."""


class _IndexUnpickler(pickle.Unpickler):
    """Finds only the classes of a checkpoint index."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise CheckpointError(f"it names {module}.{name}")
        return super().find_class(module, name)


def refuse_hostile_metadata(folder: Path) -> None:
    """Check `folder/.metadata`.

    Raises:
        CheckpointError: the file is missing, damaged, or names anything but the parts of an index.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            _IndexUnpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a checkpoint index and was not loaded: {error}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is damaged; take another one of the run") from None
    except Exception as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); take another checkpoint") from None
