"""Safe reading of the pickled parts of a torch_dist checkpoint, without running code from them.

torch's `FileSystemReader.read_metadata` calls `pickle.load` on `.metadata`
(torch/distributed/checkpoint/filesystem.py), so a hostile folder can run code on load. `read_index` reads the same
bytes first, with an unpickler that allows only the classes such an index consists of.
"""

from __future__ import annotations

import os
import pickle  # noqa: TID251  only to subclass Unpickler with an allow-list
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megadiff.errors import CheckpointError

_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED = {
    *((f"{_CHECKPOINT}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_CHECKPOINT}.metadata", f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")),
}
"""All names that occur in the index of a megatron-core 0.16 checkpoint, and no others."""


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler that finds only the classes of a checkpoint index."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise CheckpointError(f"it names {module}.{name}")
        return super().find_class(module, name)


def read_index(folder: Path) -> Any:
    """Read `folder/.metadata`: torch's `Metadata` with the shapes of a checkpoint's tensors and the places of their
    parts.

    Raises:
        CheckpointError: the file is missing, damaged, or names anything but the parts of an index.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            return _IndexUnpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a checkpoint index and was not loaded: {error}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is damaged; take another one of the run") from None
    except Exception as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); take another checkpoint") from None


@contextmanager
def unpickle_plain_objects_only() -> Iterator[None]:
    """Restrict every `torch.load` of the process to tensors and plain containers while shards are loaded.

    torch's planner reads objects in shards, such as a layer's extra state, with `weights_only=False`
    (torch/distributed/checkpoint/default_planner.py); this environment variable is torch's own override of that.

    Raises:
        CheckpointError: a shard contains anything else.
    """
    force, unforce = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, unforce)}
    os.environ[force] = "1"
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is a BaseException
        if named := re.search(r"(?i)unsupported (?:global: )?global (\S+)", str(error)):
            raise CheckpointError(f"a shard holds an object of {named[1]}, no plain data, and was not loaded") from None
        raise
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})
