"""Tensors of a model and their files: names and shapes, safetensors read and written one tensor at a time.

A training checkpoint stacks the blocks: `decoder.layers.*` tensors begin with a dimension of L. Queries, keys and
values are one matrix, in which each head of keys has its queries, itself and its values together; the rows of a gate
and of what it multiplies alternate. Embedding and head have padding rows at their end. The released layout
(`dvruette/gidd-*`) has one tensor per block and matrix, and no padding rows.

Only torch's own reader accesses the shards of a training checkpoint, and it loads tensors alone (`weights_only`).

A safetensors file is eight bytes of header length, a JSON header with each tensor's dtype, shape and offsets, and the
tensors' bytes; so a file is written in one pass once the shapes are known (https://github.com/huggingface/safetensors).
The library itself is used for reading; its writer needs all tensors of a file in memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megadiff.checkpoint.folder import HashingFile, hashed_file
from megadiff.checkpoint.manifest import FileEntry, what_it_is
from megadiff.checkpoint.safe_metadata import read_index, unpickle_plain_objects_only
from megadiff.errors import CheckpointError, shown
from megadiff.export.folder_files import INDEX, WEIGHTS, WHOLE, plain_file
from megadiff.files import UnreadableFileError, read_json_object, why
from megadiff.model.config import ModelConfig

MODULES_WITH_EXTRA_STATE = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Linear layers for which megatron-core stores an (empty) object of Transformer Engine in every checkpoint."""

_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_BLOCK_BYTES = 256 * 2**20
_MAX_INDEX_BYTES = 2**26
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class TrainingTensor:
    """One tensor of a training checkpoint, or one block's part of a stacked one."""

    key: str
    shape: tuple[int, ...]
    """Shape without the dimension of the blocks, padding rows included."""
    released: tuple[str, ...]
    """Names of the corresponding released tensors: q, k and v, or one."""
    layer: int | None = None
    """Index in the stacked tensor."""
    packed_rows: tuple[int, ...] = ()
    """Rows of each of several released tensors that alternate in this one; empty for a single one."""
    rows: int | None = None
    """Number of rows without padding, for a table over the vocabulary."""

    @property
    def offset(self) -> tuple[int, ...]:
        """Offset of its first element in the stored tensor."""
        inner = (0,) * len(self.shape)
        return inner if self.layer is None else (self.layer, *inner)

    @property
    def released_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each released tensor."""
        if not self.packed_rows:
            return ((self.rows or self.shape[0], *self.shape[1:]),)
        repeats = self.shape[0] // sum(self.packed_rows)
        return tuple((repeats * rows, *self.shape[1:]) for rows in self.packed_rows)

    def packed(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the tensor that is made of the released ones."""
        if not self.packed_rows:
            return parts[0]
        apart = [part.unflatten(0, (-1, rows)) for part, rows in zip(parts, self.packed_rows, strict=True)]
        return torch.cat(apart, dim=1).flatten(0, 1)

    def part(self, whole: Tensor, index: int) -> Tensor:
        """Return one of the released tensors that are packed in this one."""
        repeated = whole.unflatten(0, (-1, sum(self.packed_rows)))
        return repeated.split(self.packed_rows, dim=1)[index].reshape(self.released_shapes[index])


def training_tensors(model: ModelConfig, *, vocab_size: int) -> Iterator[TrainingTensor]:
    """Yield all tensors of a model, in the order of the released layout.

    Args:
        model: the model's configuration.
        vocab_size: number of real ids, mask included.
    """
    table = (model.padded_vocab_size(vocab_size), model.hidden)
    yield TrainingTensor("embedding.word_embeddings.weight", table, ("model.embed_tokens.weight",), rows=vocab_size)
    for layer in range(model.layers):
        yield from _block(model, layer)
    yield TrainingTensor("decoder.final_layernorm.weight", (model.hidden,), ("model.norm.weight",))
    if not model.tie_embeddings:
        yield TrainingTensor("output_layer.weight", table, ("lm_head.weight",), rows=vocab_size)


def released_shapes(model: ModelConfig, *, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of the released layout."""
    return {
        name: shape
        for tensor in training_tensors(model, vocab_size=vocab_size)
        for name, shape in zip(tensor.released, tensor.released_shapes, strict=True)
    }


def is_gain(released: str) -> bool:
    """Return whether a released tensor is the gain of a norm, stored as an offset from 1."""
    return released.endswith("norm.weight")


def _block(model: ModelConfig, layer: int) -> Iterator[TrainingTensor]:
    hidden, queries = model.hidden, model.heads * model.head_width
    keys = model.key_heads * model.head_width
    norms = {"full": (queries, keys), "head": (model.head_width,) * 2, "none": None}[model.qk_norm]
    sink = (model.heads, model.head_width)
    released = f"model.layers.{layer}."
    middle = ("gate_proj", "up_proj") if model.is_gated else ("up_proj",)

    def plain(key: str, shape: tuple[int, ...], name: str) -> TrainingTensor:
        return TrainingTensor(f"decoder.layers.{key}", shape, (released + name,), layer)

    def packed(key: str, shape: tuple[int, ...], names: Sequence[str], rows: tuple[int, ...]) -> TrainingTensor:
        return TrainingTensor(f"decoder.layers.{key}", shape, tuple(released + name for name in names), layer, rows)

    def projections(kind: str, *columns: int) -> TrainingTensor:
        names = [f"self_attn.{name}_proj.{kind}" for name in "qkv"]
        return packed(f"self_attention.linear_qkv.{kind}", (queries + 2 * keys, *columns), names, model.qkv_rows)

    def first_of_mlp(kind: str, *columns: int) -> TrainingTensor:
        names, shape = [f"mlp.{name}.{kind}" for name in middle], (len(middle) * model.mlp_width, *columns)
        return packed(f"mlp.linear_fc1.{kind}", shape, names, (1, 1) if model.is_gated else ())

    yield plain("self_attention.linear_qkv.layer_norm_weight", (hidden,), "attn_layernorm.weight")
    yield projections("weight", hidden)
    if model.qkv_bias:
        yield projections("bias")
    yield plain("self_attention.linear_proj.weight", (hidden, queries), "self_attn.o_proj.weight")
    if model.attention_out_bias:
        yield plain("self_attention.linear_proj.bias", (hidden,), "self_attn.o_proj.bias")
    if norms:
        yield plain("self_attention.q_layernorm.weight", (norms[0],), "self_attn.q_norm.weight")
        yield plain("self_attention.k_layernorm.weight", (norms[1],), "self_attn.k_norm.weight")
    if model.sink:
        yield plain("self_attention.core_attention.sink_key", sink, "self_attn.k_bias")
        yield plain("self_attention.core_attention.sink_value", sink, "self_attn.v_bias")
    yield plain("mlp.linear_fc1.layer_norm_weight", (hidden,), "mlp_layernorm.weight")
    yield first_of_mlp("weight", hidden)
    if model.mlp_bias:
        yield first_of_mlp("bias")
    yield plain("mlp.linear_fc2.weight", (hidden, model.mlp_width), "mlp.down_proj.weight")
    if model.mlp_bias:
        yield plain("mlp.linear_fc2.bias", (hidden,), "mlp.down_proj.bias")


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


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size in a file, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows_at_once(self) -> int:
        """Number of leading rows that together take at most a block of memory; at least one."""
        return max(1, _BLOCK_BYTES * self.shape[0] // max(self.bytes, 1))


Fetch = Callable[[Planned], Iterable[Tensor]]
"""Function that returns a tensor as consecutive contiguous blocks of its leading rows, in its dtype."""


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
    """Write all tensors and their index; return size and hash of every file.

    Args:
        folder: the folder to write to.
        planned: the tensors, in order.
        fetch: called once per tensor, in order; what it yields is written at once and freed.
        max_bytes: maximal size of a file.
        on_file: called with each finished weight file.
    """
    files = shards(planned, max_bytes=max_bytes)
    numbered = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    names = numbered if len(files) > 1 else [WHOLE]
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
            "dtype": _DTYPE_NAMES[tensor.dtype],
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

    `shapes` holds the shape of every tensor, from the files' headers.
    """

    def __init__(self, folder: Path) -> None:
        """Open the files and read their headers.

        Raises:
            CheckpointError: there are none, one is missing or damaged, the index and the files disagree, or a tensor is
                stored as something other than floats of 16 or 32 bits.
        """
        self._folder, self._stack = folder, ExitStack()
        self._files: dict[str, Any] = {}
        try:
            self._open(*_file_names(folder))
        except BaseException:
            self._stack.close()
            raise
        slices = {name: file.get_slice(name) for name, file in self._files.items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(one.get_shape()) for name, one in slices.items()}
        self._dtypes = {name: one.get_dtype() for name, one in slices.items()}
        strange = next((name for name, found in self._dtypes.items() if found not in _DTYPES), None)
        if strange is not None:
            self._stack.close()
            raise CheckpointError(
                f"{folder}: {shown(strange)} is stored as {self._dtypes[strange]}; wanted one of {', '.join(_DTYPES)}"
            )

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which a tensor is stored, without reading its data."""
        return _DTYPES[self._dtypes[name]]

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._files[name].get_tensor(name)

    def check_layers(self, wanted: int, *, where: str, layers: re.Pattern[str] = _LAYER) -> None:
        """Compare a number of layers with the names of the tensors, before it is used.

        Args:
            wanted: the number.
            where: where it comes from, for messages.
            layers: pattern of the names of a layer's tensors, whose first group is the layer's number.

        Raises:
            CheckpointError: the weights have more or fewer layers.
        """
        found = {match[1] for name in self.shapes if (match := layers.match(name))}
        if len(found) != wanted:
            raise CheckpointError(
                f"{where} has num_hidden_layers={wanted}, but the weight files beside it hold {len(found)} layers; "
                "fetch the folder again"
            )

    def _open(self, names: Sequence[str], places: Mapping[str, str] | None) -> None:
        for name in names:
            path = plain_file(self._folder, name)
            if path is None:
                raise CheckpointError(f"{self._folder / name} is missing; fetch it again")
            try:
                opened = self._stack.enter_context(safe_open(path, framework="pt"))
                keys = opened.keys()
            except (OSError, SafetensorError, ValueError) as error:
                raise CheckpointError(f"{path} is missing or damaged ({error}); fetch it again") from None
            for key in keys:
                if key in self._files or (places is not None and places.get(key) != name):
                    beside = "another file" if key in self._files else f"{INDEX}, which names another place for it"
                    raise CheckpointError(f"{path} holds {shown(key)}, in contradiction to {beside}; fetch it again")
                self._files[key] = opened
        lost = next((key for key in places or () if key not in self._files), None)
        if lost is not None:
            raise CheckpointError(f"{self._folder / INDEX} names {shown(lost)}, which no file holds; fetch it again")


def _file_names(folder: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """Return the weight files, and, if there is an index, the file of each tensor."""
    index, whole = plain_file(folder, INDEX), plain_file(folder, WHOLE)
    if index is not None:
        places = _places(index)
        if whole is not None and WHOLE not in places.values():
            raise CheckpointError(
                f"{folder} holds both {WHOLE} and {INDEX}, two sets of weights; move one of them away"
            )
        return sorted(set(places.values())), places
    if whole is not None:
        return [WHOLE], None
    raise CheckpointError(
        f"{folder} holds no safetensors weights ({INDEX} or {WHOLE}): it is {what_it_is(folder)}; give a folder that "
        "save_pretrained or `megadiff convert_checkpoint export` wrote (other formats can run code and are not read)"
    )


def _places(index: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    try:
        found = read_json_object(index, max_bytes=_MAX_INDEX_BYTES)
        places = found["weight_map"]
        if not isinstance(places, dict) or not places:
            raise UnreadableFileError("has a weight_map that is not an object of file names")
    except KeyError:
        raise CheckpointError(f"{index} is damaged (it has no weight_map); fetch it again") from None
    except (UnreadableFileError, OSError) as error:
        raise CheckpointError(f"{index} {why(error)}; fetch it again") from None
    strange = [
        name
        for name in places.values()
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(WEIGHTS) or len(name) > 200
    ]
    if strange:
        raise CheckpointError(f"{index} names {shown(strange[0])}, which is no weight file beside it; fetch it again")
    return places
