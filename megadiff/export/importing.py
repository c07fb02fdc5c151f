"""A Hugging Face folder as a training checkpoint: to go on training, to measure, to sample.

Read are GIDD folders (ours or the released `dvruette/gidd-*`) and the autoregressive ones that `next_token_source`
names. Only safetensors are read, and no code of the folder is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

import megadiff
from megadiff.checkpoint.durable import entry_of
from megadiff.checkpoint.manifest import FORMAT, Manifest
from megadiff.data.tokenizer_files import load_tokenizer
from megadiff.data.tokenizers import Tokenizer
from megadiff.diffusion.config import ConditioningConfig, NoiseConfig
from megadiff.errors import SHOWN_DIGITS, CheckpointError
from megadiff.export.export import CHECKSUMS, TRAINING, staged
from megadiff.export.next_token_source import next_token_dtype, next_token_model, read_next_token
from megadiff.export.released_config import conditioning_from, model_from, model_keys, noise_from
from megadiff.export.training_checkpoint import write_training_checkpoint
from megadiff.export.weight_files import WeightFiles
from megadiff.export.weights import TrainingTensor, released_shapes, training_tensors
from megadiff.model.config import ModelConfig


@dataclass(frozen=True)
class Imported:
    """What was written."""

    folder: Path
    model: ModelConfig
    manifest: Manifest
    parameters: int


@dataclass(frozen=True)
class _Source:
    """A folder's description of itself."""

    folder: Path
    config: dict[str, Any]
    training: dict[str, Any] | None
    """What our own export says of the run."""

    @property
    def is_gidd(self) -> bool:
        return self.config.get("model_type") == "gidd"

    @property
    def where(self) -> str:
        return str(self.folder / "config.json")


def import_folder(
    folder: Path,
    output: Path,
    *,
    tokenizer: str | None = None,
    seq_length: int | None = None,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> Imported:
    """Write `output`, a checkpoint of step 0 without optimizer state, whole or not at all.

    Args:
        folder: the Hugging Face folder; its checksums are checked where it has them.
        output: must not exist, or be empty.
        tokenizer: path to use instead of the folder's own.
        seq_length: row length to train with, instead of the folder's.

    Raises:
        CheckpointError: no such folder, damaged files, another model than can be trained here, or a tokenizer that does
            not fit it.
        ConfigError: `output` holds something.
        DataError: the tokenizer cannot be read.
    """
    source = _source(folder)
    _verify_checksums(folder)
    with WeightFiles(folder) as files:
        model = _model(source, files)
        if seq_length is not None:
            model = model.model_copy(update={"seq_length": seq_length})
        text, said = _tokenizer(source, tokenizer)
        vocab_size = _vocab_size(source, text)
        tensors = list(training_tensors(model, vocab_size=vocab_size))
        if source.is_gidd:
            _check_shapes(source, files, model, vocab_size)
        manifest = _manifest(source, model, text, said, vocab_size)
        fetch = _Fetch(source, files, on_tensor)
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
    return Imported(output, model, manifest, sum(torch.Size(shape).numel() for shape in shapes.values()))


class _Fetch:
    """Training tensors out of the folder's files."""

    def __init__(self, source: _Source, files: WeightFiles, on_tensor: Callable[[str], None]) -> None:
        self._source, self._files, self._on_tensor = source, files, on_tensor
        self._dtypes: dict[str, torch.dtype] = {}

    def __call__(self, tensor: TrainingTensor) -> Tensor:
        self._on_tensor(tensor.released[0])
        if not self._source.is_gidd:
            found = read_next_token(tensor, self._files, self._source.config)
        elif tensor.heads:
            rows = [self._files.read(name).unflatten(0, (tensor.heads, -1)) for name in tensor.released]
            found = torch.stack(rows, dim=1).flatten(0, 2)
        else:
            found = self._files.read(tensor.released[0])
        found = found.to(self.dtype(tensor))
        dead = tensor.shape[0] - found.shape[0]
        return torch.cat([found, found.new_zeros(dead, *found.shape[1:])]) if dead else found.contiguous()

    def dtype(self, tensor: TrainingTensor) -> torch.dtype:
        """What a tensor is written in: as it is stored, all blocks' alike."""
        if tensor.key not in self._dtypes:
            stored = self._files.dtype(tensor.released[0]) if self._has(tensor) else torch.float32
            self._dtypes[tensor.key] = stored if self._source.is_gidd else next_token_dtype(tensor, stored)
        return self._dtypes[tensor.key]

    def _has(self, tensor: TrainingTensor) -> bool:
        return tensor.released[0] in self._files.shapes


def _source(folder: Path) -> _Source:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give one with config.json and safetensors weights")
    config = _json(folder / "config.json")
    if config is None:
        raise CheckpointError(f"{folder} has no config.json; give a folder that save_pretrained or an export wrote")
    return _Source(folder, config, _training(folder / TRAINING))


def _training(path: Path) -> dict[str, Any] | None:
    """What our own export says of the run; None where the folder is another's."""
    found = _json(path)
    if found is None:
        return None
    try:
        ModelConfig.model_validate(found["config"]["model"])
        names = ("noise", "conditioning", "objective", "data")
        strange = [name for name in names if not isinstance(found["config"][name], dict)]
        if strange or "name" not in found["config"]["objective"]:
            raise TypeError(f"{(*strange, 'objective')[0]} is no such section")
    except (KeyError, TypeError, ValidationError) as error:
        what = " ".join(str(error).splitlines()[:2])
        raise CheckpointError(
            f"{path} is damaged ({what}); fetch it again, or move it away to go by config.json alone"
        ) from None
    return found


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object; fetch it again")
    return found


def _verify_checksums(folder: Path) -> None:
    """safetensors notices a cut file but no flipped bit."""
    path = folder / CHECKSUMS
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        digest, _, name = line.partition("  ")
        target = folder / Path(name).name
        if not target.is_file():
            raise CheckpointError(f"{target} is missing, which {CHECKSUMS} lists; fetch the folder again")
        if name.endswith(".safetensors") and entry_of(target).sha256 != digest:
            raise CheckpointError(f"{target} is damaged: its content is not what {CHECKSUMS} says; fetch it again")


def _model(source: _Source, files: WeightFiles) -> ModelConfig:
    if not source.is_gidd:
        return next_token_model(source.config, files.shapes, where=source.where)
    model = model_from(source.config, where=source.where)
    if source.training is None:
        return model
    trained = ModelConfig.model_validate(source.training["config"]["model"])
    # config.json is what a person may have edited; where both say the same, the run's own words are kept.
    return trained if model_keys(trained) == model_keys(model) or _same_keys(source.config, trained) else model


def _same_keys(config: dict[str, Any], model: ModelConfig) -> bool:
    return all(config.get(key) == value for key, value in model_keys(model).items())


def _tokenizer(source: _Source, given: str | None) -> tuple[Tokenizer, str]:
    """The tokenizer, and what a run calls it."""
    trained_with = (source.training or {}).get("config", {}).get("data", {}).get("tokenizer")
    said = given or ("byte" if trained_with == "byte" else str(source.folder.resolve()))
    found = load_tokenizer(said)
    wanted = (source.training or {}).get("tokenizer_fingerprint")
    if wanted not in (None, found.fingerprint):
        raise CheckpointError(
            f"{source.folder} was trained with another tokenizer ({wanted[:SHOWN_DIGITS]}) than {said} "
            f"({found.fingerprint[:SHOWN_DIGITS]}); give the first one's path with --tokenizer"
        )
    return found, said


def _vocab_size(source: _Source, tokenizer: Tokenizer) -> int:
    """Real ids, the mask among them."""
    said, mask = source.config.get("vocab_size"), source.config.get("mask_token_id", 3)
    if not source.is_gidd:
        return tokenizer.vocab_size
    if tokenizer.vocab_size != said or tokenizer.mask_id != mask:
        raise CheckpointError(
            f"{source.where} speaks of {said} ids with the mask {mask}, but the tokenizer {tokenizer.name} has "
            f"{tokenizer.vocab_size} with the mask {tokenizer.mask_id}; give the right one with --tokenizer"
        )
    return tokenizer.vocab_size


def _check_shapes(source: _Source, files: WeightFiles, model: ModelConfig, vocab_size: int) -> None:
    wanted, found = released_shapes(model, vocab_size=vocab_size), files.shapes
    for name in sorted(set(wanted) | set(found)):
        if wanted.get(name) != found.get(name):
            what = "is missing" if name not in found else f"has shape {found[name]}"
            want = "no such tensor" if name not in wanted else f"{wanted[name]}"
            raise CheckpointError(f"{source.folder}: {name} {what}, its config.json wants {want}; fetch it again")


def _manifest(source: _Source, model: ModelConfig, tokenizer: Tokenizer, said: str, vocab_size: int) -> Manifest:
    return Manifest.model_validate(
        {
            "format": FORMAT,
            "step": 0,
            "samples": 0,
            "tokens": 0,
            "has_optimizer": False,
            "config": {**_sections(source), "model": model.model_dump(mode="json"), "data": {"tokenizer": said}},
            "vocab_size": vocab_size,
            "mask_id": tokenizer.mask_id,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "data_fingerprint": "",
            "layout": {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "data": 1},
            "versions": {
                "megadiff": megadiff.__version__,
                "torch": torch.__version__,
                "megatron-core": version("megatron-core"),
            },
        }
    )


def _sections(source: _Source) -> dict[str, Any]:
    """Noise, conditioning and objective: the run's own words where our export gave them and still agree."""
    if not source.is_gidd:
        return {
            "noise": NoiseConfig().model_dump(mode="json"),
            "conditioning": ConditioningConfig().model_dump(mode="json"),
            "objective": {"name": "ar"},
        }
    name = "ar" if source.config.get("is_causal") else "gidd"
    if source.training is not None:
        kept = {key: source.training["config"][key] for key in ("noise", "conditioning", "objective")}
        if kept["objective"]["name"] == name:
            return kept
    return {
        "noise": noise_from(source.config).model_dump(mode="json"),
        "conditioning": conditioning_from(source.config).model_dump(mode="json"),
        "objective": {"name": name},
    }
