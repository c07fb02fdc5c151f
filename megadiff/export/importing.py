"""Import of a Hugging Face folder as a training checkpoint, to continue training, evaluate or sample.

It reads GIDD folders (this package's or the released `dvruette/gidd-*`) and those of the public models described in
`architectures`. Only safetensors are read, and no code of the folder is run.

The torch_dist format is independent of the layout: each tensor's index records the location of its parts, so one file
written here can be loaded by any number of ranks. It holds no optimizer state.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
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

import megadiff
from megadiff.checkpoint.folder import entry_of
from megadiff.checkpoint.manifest import FORMAT, Manifest
from megadiff.data.tokenizers import Tokenizer, load_tokenizer
from megadiff.diffusion.config import (
    PROCESSES,
    WEIGHTINGS,
    ConditioningConfig,
    NoiseConfig,
    ObjectiveConfig,
    noise_config,
)
from megadiff.errors import SHOWN_DIGITS, CheckpointError, ConfigError, shown
from megadiff.export.export import staged
from megadiff.export.folder_files import CONFIG, TRAINING, Checksums, check_folder, plain_file
from megadiff.export.public_source import MaskRow, PublicSource
from megadiff.export.released_config import (
    ReleasedConfig,
    agree,
    conditioning_from,
    first_complaint,
    model_from,
    model_keys,
    noise_from,
    read_released,
)
from megadiff.export.weight_files import (
    MODULES_WITH_EXTRA_STATE,
    TrainingTensor,
    WeightFiles,
    released_shapes,
    training_tensors,
)
from megadiff.files import UnreadableFileError, read_json_object, sync, why
from megadiff.methods import METHODS, MethodConfig
from megadiff.model.config import ModelConfig

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


_MAX_BYTES = 2**23
"""Maximal size of a `config.json` or `training.json`; such files have a few thousand bytes."""


@dataclass(frozen=True)
class Imported:
    """Result of an import."""

    folder: Path
    model: ModelConfig
    manifest: Manifest
    parameters: int
    is_checked: bool
    """Whether the folder has checksums, against which its files were checked."""


class _TrainingSections(BaseModel):
    """Parts of the run's configuration that a checkpoint imported from its export repeats."""

    model_config = ConfigDict(extra="ignore")

    model: ModelConfig
    noise: Annotated[NoiseConfig, PROCESSES]
    conditioning: ConditioningConfig
    objective: Annotated[ObjectiveConfig, WEIGHTINGS]
    method: Annotated[MethodConfig, METHODS]
    data: dict[str, Any]

    @field_validator("noise", mode="before")
    @classmethod
    def _noise_is_of_the_package(cls, noise: Any) -> Any:
        if isinstance(noise, dict) and "." in str(noise.get("process")):
            raise ValueError(f"noise.process is {shown(noise['process'])}, a module that an import does not load")
        return noise

    @field_validator("objective", mode="before")
    @classmethod
    def _weighting_is_of_the_package(cls, objective: Any) -> Any:
        """Leave out a weighting of the run's own: no file of a folder has a module loaded, and weights need none."""
        is_own = isinstance(objective, dict) and "." in str(objective.get("weighting"))
        return {} if is_own else objective

    @field_validator("method", mode="before")
    @classmethod
    def _method_is_of_the_package(cls, method: Any) -> Any:
        """Replace a method of the run's own, whose module no import loads, by the one that samples its models."""
        is_own = isinstance(method, dict) and "." in str(method.get("name"))
        return {"name": "gidd"} if is_own else method


class _Training(BaseModel):
    """Content of `training.json`, which this package's export adds."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    config: _TrainingSections
    tokenizer_fingerprint: str | None = Field(default=None)
    prepended_bos: bool | None = None


@dataclass(frozen=True)
class _Source:
    """A folder's description of itself."""

    folder: Path
    config: dict[str, Any]
    released: ReleasedConfig | None
    """Keys of a GIDD folder; None for one of a public model."""
    training: _Training | None
    """Facts about the run that this package's export adds."""

    @property
    def where(self) -> str:
        return str(self.folder / CONFIG)


def import_folder(
    folder: Path,
    output: Path,
    *,
    tokenizer: str | None = None,
    seq_length: int | None = None,
    mask_row: int | Literal["mean"] | None = None,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> Imported:
    """Write `output`, a checkpoint of step 0 without optimizer state, completely or not at all.

    Whatever can be refused without reading the weights is refused before they are read. Nothing is built or allocated
    from the configuration before it agrees with the sizes in the weight files' own headers.

    Args:
        folder: the Hugging Face folder; if it has checksums, every file that they list is compared.
        output: must not exist, or be empty.
        tokenizer: path to use instead of the folder's own.
        seq_length: sequence length to train with, instead of the folder's.
        mask_row: for a model that was trained without a mask, what its tables get as the row of one: that of a token,
            or the mean of all; None for the row as it is stored, or the mean where the tables end before it.
        on_tensor: called with each tensor's name before it is read.

    Raises:
        CheckpointError: there is no such folder, files are damaged, the model cannot be trained here, or the tokenizer
            does not fit it.
        ConfigError: `output` is not empty.
        DataError: the tokenizer cannot be read.
    """
    check_folder(folder)
    sums = Checksums(folder)
    sums.compare(weights=False)
    source = _source(folder)
    with WeightFiles(folder) as files:
        public = None if source.released else PublicSource(source.config, files, where=source.where)
        model = public.model if public else _model(source)
        text, reference = _tokenizer(source, tokenizer)
        if public is not None:
            vocab_size = public.vocab_size(text)
        else:
            vocab_size = _vocab_size(source, text)
            _check_shapes(source, files, model, vocab_size)
        mask = None if mask_row is None else _mask_row(source, public, text, mask_row)
        if seq_length is not None:
            model = model.model_copy(update={"seq_length": seq_length})
        method = public.method if public else None
        manifest = _manifest(source, model, text, reference, vocab_size, method)
        sums.compare(weights=True)
        tensors = list(training_tensors(model, vocab_size=vocab_size))
        fetch = _Fetch(public, files, mask, on_tensor)
        with staged(output) as staging:
            write_training_checkpoint(
                staging,
                tensors,
                fetch,
                dtypes={tensor.key: fetch.dtype(tensor) for tensor in tensors},
                layers=model.layers,
                manifest=manifest,
            )
    shapes = released_shapes(model, vocab_size=vocab_size)
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    return Imported(output, model, manifest, parameters, sums.exists)


class _Fetch:
    """Reader of training tensors from the folder's files."""

    def __init__(
        self, public: PublicSource | None, files: WeightFiles, mask: MaskRow | None, on_tensor: Callable[[str], None]
    ) -> None:
        self._public, self._files, self._mask, self._on_tensor = public, files, mask, on_tensor
        self._dtypes: dict[str, torch.dtype] = {}

    def __call__(self, tensor: TrainingTensor) -> Tensor:
        self._on_tensor(tensor.released[0])
        if self._public is not None:
            found = self._public.read(tensor, mask=self._mask)
        else:
            found = tensor.packed([self._files.read(name) for name in tensor.released])
        found = found.to(self.dtype(tensor))
        dead = tensor.shape[0] - found.shape[0]
        return torch.cat([found, found.new_zeros(dead, *found.shape[1:])]) if dead else found.contiguous()

    def dtype(self, tensor: TrainingTensor) -> torch.dtype:
        """Return the type in which a tensor is written: as it is stored, the same for all blocks."""
        if tensor.key not in self._dtypes:
            found = self._public.dtype(tensor) if self._public else self._files.dtype(tensor.released[0])
            self._dtypes[tensor.key] = found
        return self._dtypes[tensor.key]


def _mask_row(
    source: _Source, public: PublicSource | None, tokenizer: Tokenizer, row: int | Literal["mean"]
) -> MaskRow:
    """Return what the tables get as the mask's row.

    Raises:
        CheckpointError: the model has a mask already.
        ConfigError: there is no such token.
    """
    if public is None or public.method != "next_token":
        raise CheckpointError(
            f"--mask-row is for autoregressive models, but {source.where} is a model that was trained with a mask; "
            "leave it out"
        )
    if row != "mean" and not 0 <= row < tokenizer.vocab_size:
        raise ConfigError(f"--mask-row {row}: wanted `mean` or an id from 0 to {tokenizer.vocab_size - 1:,}")
    return MaskRow(tokenizer.mask_id, row)


def _source(folder: Path) -> _Source:
    config = _json(folder, CONFIG)
    assert config is not None
    is_gidd = config.get("model_type") == "gidd"
    released = read_released(config, where=str(folder / CONFIG)) if is_gidd else None
    if released is not None and released.noise_table is not None:
        raise CheckpointError(
            f"{folder / CONFIG} holds a table of its noise (noise_table), from which text can be sampled in "
            "Transformers (examples/sample_exported.py) but no run continued; for anything else give the training "
            "checkpoint that was exported"
        )
    return _Source(folder, config, released, _training(folder))


def _training(folder: Path) -> _Training | None:
    """Return the facts about the run that this package's export adds; None for other folders."""
    found = _json(folder, TRAINING)
    if found is not None and found.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / TRAINING} has format {shown(found.get('format'))}, this version reads {FORMAT}; export the "
            f"checkpoint with this version, or move the file away to go by {CONFIG} alone"
        )
    try:
        return None if found is None else _Training.model_validate(found)
    except ValidationError as error:
        raise CheckpointError(
            f"{folder / TRAINING} is damaged ({first_complaint(error)}); fetch it again, or move it away to use "
            f"{CONFIG} alone"
        ) from None


def _json(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the object in a file of the folder; None if there is no such file."""
    path = plain_file(folder, name)
    try:
        return None if path is None else read_json_object(path, max_bytes=_MAX_BYTES)
    except (UnreadableFileError, OSError) as error:
        raise CheckpointError(f"{path} {why(error)}; fetch it again") from None


def _model(source: _Source) -> ModelConfig:
    assert source.released is not None
    model = model_from(source.released, where=source.where)
    if source.training is None:
        return model
    trained = source.training.config.model
    # config.json may have been edited by a person; if both agree, the run's own configuration is kept.
    return trained if model_keys(trained) == model_keys(model) or _same_keys(source.config, trained) else model


def _same_keys(config: dict[str, Any], model: ModelConfig) -> bool:
    return all(config.get(key) == value for key, value in model_keys(model).items())


def _tokenizer(source: _Source, given: str | None) -> tuple[Tokenizer, str]:
    """Return the tokenizer, and the name by which a run refers to it."""
    training = source.training
    trained_with = training.config.data.get("tokenizer") if training else None
    reference = given or ("byte" if trained_with == "byte" else str(source.folder.resolve()))
    found = load_tokenizer(reference)
    wanted = training.tokenizer_fingerprint if training else None
    if wanted not in (None, found.fingerprint):
        named = f" {shown(trained_with)}" if isinstance(trained_with, str) else ""
        its = "the one in that folder" if reference == str(source.folder.resolve()) else reference
        raise CheckpointError(
            f"{source.folder} was trained with the tokenizer{named} ({str(wanted)[:SHOWN_DIGITS]}), which differs from "
            f"{its} ({found.fingerprint[:SHOWN_DIGITS]}); give the one it was trained with by --tokenizer"
        )
    return found, reference


def _vocab_size(source: _Source, tokenizer: Tokenizer) -> int:
    """Return the number of real ids, mask included."""
    assert source.released is not None
    wanted, mask = source.released.vocab_size, source.released.mask_token_id
    if tokenizer.vocab_size != wanted or tokenizer.mask_id != mask:
        raise CheckpointError(
            f"{source.where} describes {wanted} ids with the mask {mask}, but the tokenizer {tokenizer.name} has "
            f"{tokenizer.vocab_size} with the mask {tokenizer.mask_id}; give the right one with --tokenizer"
        )
    return tokenizer.vocab_size


def _check_shapes(source: _Source, files: WeightFiles, model: ModelConfig, vocab_size: int) -> None:
    files.check_layers(model.layers, where=source.where)
    wanted, found = released_shapes(model, vocab_size=vocab_size), files.shapes
    for name in sorted(set(wanted) | set(found)):
        if wanted.get(name) != found.get(name):
            what = "is missing" if name not in found else f"has shape {found[name]}"
            want = "no such tensor" if name not in wanted else f"{wanted[name]}"
            raise CheckpointError(
                f"{source.folder}: {shown(name)[1:-1]} {what}, its config.json requires {want}; fetch it again"
            )


def _manifest(
    source: _Source, model: ModelConfig, tokenizer: Tokenizer, reference: str, vocab_size: int, method: str | None
) -> Manifest:
    """Return the manifest; `method` is the training method of a public model."""
    return Manifest.model_validate(
        {
            "format": FORMAT,
            "step": 0,
            "samples": 0,
            "tokens": 0,
            "has_optimizer": False,
            "config": {
                **_sections(source, method),
                "model": model.model_dump(mode="json"),
                "data": {"tokenizer": reference},
            },
            "vocab_size": vocab_size,
            "mask_id": tokenizer.mask_id,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "data_fingerprint": "",
            "prepended_bos": source.config.get("prepended_bos") is True or _prepends_bos(source),
            "layout": {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "data": 1},
            "versions": {
                "megadiff": megadiff.__version__,
                "torch": torch.__version__,
                "megatron-core": version("megatron-core"),
            },
        }
    )


def _prepends_bos(source: _Source) -> bool:
    return source.released is None and source.training is not None and source.training.prepended_bos is True


def _sections(source: _Source, method: str | None) -> dict[str, Any]:
    """Return noise, conditioning, objective and method: the run's own if our export recorded them and they agree.

    Public diffusion models are of masked noise.
    """
    if source.released is None:
        kept = source.training.config if source.training is not None else None
        if kept is not None and (kept.method.name == "next_token") == (method == "next_token"):
            return {
                name: getattr(kept, name).model_dump(mode="json")
                for name in ("noise", "conditioning", "objective", "method")
            }
        return {
            "noise": noise_config(shift="masked").model_dump(mode="json"),
            "conditioning": ConditioningConfig().model_dump(mode="json"),
            "objective": ObjectiveConfig().model_dump(mode="json"),
            "method": {"name": method},
        }
    name = "next_token" if source.released.is_causal else "gidd"
    noise = noise_from(source.released, where=source.where)
    kept = source.training.config if source.training is not None else None
    is_alike = kept is not None and (kept.method.name == "next_token") == source.released.is_causal
    if kept is not None and is_alike and agree(source.config, kept.noise, kept.conditioning):
        sections = {"noise": kept.noise, "conditioning": kept.conditioning, "objective": kept.objective}
        dumped = {key: section.model_dump(mode="json") for key, section in sections.items()}
        return {**dumped, "method": kept.method.model_dump(mode="json")}
    return {
        "noise": noise.model_dump(mode="json"),
        "conditioning": conditioning_from(source.released).model_dump(mode="json"),
        "objective": ObjectiveConfig().model_dump(mode="json"),
        "method": {"name": name},
    }
