"""Sharded safetensors files, written and read one tensor at a time.

A safetensors file is eight bytes of header length, a JSON header with each tensor's dtype, shape and place, and the
tensors' bytes; so a file is written in one pass once the shapes are known (https://github.com/huggingface/safetensors).
The library itself reads; its writer wants a whole file's tensors in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megadiff.checkpoint.durable import HashingFile, hashed_file
from megadiff.checkpoint.manifest import FileEntry
from megadiff.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_BLOCK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows_at_once(self) -> int:
        """Leading rows that together take at most a block of memory; at least one."""
        return max(1, _BLOCK_BYTES * self.shape[0] // max(self.bytes, 1))


Fetch = Callable[[Planned], Iterable[Tensor]]
"""A tensor as consecutive blocks of its leading rows, contiguous, of its dtype."""


def shards(planned: Sequence[Planned], *, max_bytes: int) -> list[list[Planned]]:
    """Cut a list of tensors, in order, into files of at most `max_bytes`; a larger tensor gets a file of its own."""
    files: list[list[Planned]] = []
    used = 0
    for tensor in planned:
        if not files or used + tensor.bytes > max_bytes:
            files.append([])
            used = 0
        files[-1].append(tensor)
        used += tensor.bytes
    return files


def write_weights(
    folder: Path,
    planned: Sequence[Planned],
    fetch: Fetch,
    *,
    max_bytes: int,
    on_file: Callable[[Path], None] = lambda path: None,
) -> dict[str, FileEntry]:
    """Write all tensors and their index; returns size and hash of every file.

    Args:
        fetch: called once a tensor, in order; what it yields is written at once and let go.
        on_file: called with each finished weight file.
    """
    files = shards(planned, max_bytes=max_bytes)
    numbered = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    names = numbered if len(files) > 1 else [_WHOLE]
    entries: dict[str, FileEntry] = {}
    for name, tensors in zip(names, files, strict=True):
        with hashed_file(folder / name) as file:
            _write_one(file, tensors, fetch)
        entries[name] = file.entry()
        on_file(folder / name)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.bytes for tensor in planned)},
            "weight_map": {tensor.name: name for name, part in zip(names, files, strict=True) for tensor in part},
        }
        with hashed_file(folder / INDEX) as file:
            file.write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
        entries[INDEX] = file.entry()
    return entries


def _write_one(file: HashingFile, tensors: Sequence[Planned], fetch: Fetch) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.bytes],
        }
        place += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for tensor in tensors:
        before = file.tell()
        for block in fetch(tensor):
            assert block.dtype == tensor.dtype, (tensor, block.dtype)
            file.write(block.contiguous().view(-1).view(torch.uint8).numpy().data)
        assert file.tell() - before == tensor.bytes, tensor


class WeightFiles:
    """The tensors of a Hugging Face folder, read one at a time; a context that keeps the files open.

    `shapes` are those of every tensor.
    """

    def __init__(self, folder: Path) -> None:
        """Find the files.

        Raises:
            CheckpointError: there are none, the index names one that is missing, or one is damaged.
        """
        self._folder, self._stack = folder, ExitStack()
        self._files: dict[str, Any] = {}
        for name in _file_names(folder):
            try:
                opened = self._stack.enter_context(safe_open(folder / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                self._stack.close()
                raise CheckpointError(f"{folder / name} is missing or damaged ({error}); fetch it again") from None
            self._files.update(dict.fromkeys(opened.keys(), opened))
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()
        }

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is stored in; its data are not read.

        Raises:
            CheckpointError: neither float32 nor one of the 16-bit floats.
        """
        found = self._files[name].get_slice(name).get_dtype()
        if found not in _DTYPES:
            raise CheckpointError(f"{self._folder}: {name} is stored as {found}; wanted one of {', '.join(_DTYPES)}")
        return _DTYPES[found]

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._files[name].get_tensor(name)


def _file_names(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX} is damaged ({error}); fetch it again") from None
        strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if strange:
            raise CheckpointError(f"{folder / INDEX} names {strange[0]!r}, which is no file beside it; fetch it again")
        return names
    if (folder / _WHOLE).is_file():
        return [_WHOLE]
    raise CheckpointError(
        f"{folder} holds no safetensors weights ({INDEX} or {_WHOLE}); give a folder that save_pretrained or "
        "tools/convert_checkpoint.py export wrote (other formats can run code and are not read)"
    )
