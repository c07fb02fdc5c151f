"""Checkpoints of public models (`architectures`) as a starting point for training.

A checkpoint fits if its `model_type` is one of a known architecture and its configuration needs nothing that this
model lacks: no sliding windows, experts, partial rotations or other norms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import CheckpointError, shown
from megadiff.export.architectures import ACTIVATIONS, ARCHITECTURES, Architecture, mlp_of
from megadiff.export.released_config import first_complaint
from megadiff.export.weight_files import TrainingTensor, WeightFiles, is_gain, training_tensors
from megadiff.model.config import ModelConfig, RopeScaling

_EMBEDDING = "model.embed_tokens.weight"
_NOT_WEIGHTS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Names of tables that older programs store beside the weights and that follow from the configuration."""

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")

FEWEST_IDS = 0.75
"""Least share of an embedding's entries that are ids of its tokenizer; public tables are padded by a few hundred."""
MOST_ADDED_IDS = 128
"""Maximal number of ids that a tokenizer may have beyond the embedding's, such as a mask; they get its mean row."""


class _Rope(BaseModel):
    """The object of the rotary embeddings in a `config.json`, strictly typed; a key beside these changes the model."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = Field(default=None, ge=1, lt=2**53)
    partial_rotary_factor: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = Field(default=None, gt=0, lt=2**31)
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    truncate: bool | None = None
    finetuned: bool | None = None


class _Keys(BaseModel):
    """The keys of a `config.json` that are read, strictly typed."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    hidden_size: int = Field(gt=0, le=2**20)
    num_hidden_layers: int = Field(gt=0, le=2**16)
    num_attention_heads: int = Field(gt=0, le=2**16)
    num_key_value_heads: int | None = Field(default=None, gt=0, le=2**16)
    intermediate_size: int = Field(gt=0, le=2**24)
    max_position_embeddings: int = Field(gt=0, lt=2**31)
    head_dim: int | None = Field(default=None, gt=0, le=2**20)
    hidden_act: str | None = None
    tie_word_embeddings: bool = False
    rms_norm_eps: float = Field(default=1e-6, gt=0, le=1)
    rope_theta: float | None = Field(default=None, ge=1, lt=2**53)
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    no_rope_layers: list[int] | None = None
    partial_rotary_factor: float | None = None
    layer_types: list[str] | None = None
    use_sliding_window: bool | None = None
    sliding_window: int | None = None

    @property
    def rope(self) -> _Rope:
        """The rotary embeddings' own keys; transformers 5 has the base among them."""
        return self.rope_scaling or self.rope_parameters or _Rope()

    @property
    def theta(self) -> float:
        """Base of the rotary frequencies."""
        return self.rope.rope_theta or self.rope_theta or 10000.0

    @property
    def rope_kind(self) -> str:
        """Kind of scaling of the rotary frequencies; `default` for none."""
        return self.rope.rope_type or self.rope.type or "default"

    def slides(self, *, by_switch: bool) -> bool:
        """Return whether some layers attend only to a sliding window; `by_switch`, if `use_sliding_window` says so."""
        if self.layer_types:
            return "sliding_attention" in self.layer_types
        is_on = self.use_sliding_window is True if by_switch else self.use_sliding_window is not False
        return is_on and bool(self.sliding_window)


@dataclass(frozen=True)
class MaskRow:
    """The row that tables over the vocabulary get for a mask that the model was not trained with."""

    mask_id: int
    source: int | Literal["mean"]
    """Id of a token whose row is copied, or `mean` for the mean of all rows."""


class PublicSource:
    """A checkpoint of a public architecture, read as tensors of this model."""

    def __init__(self, config: Mapping[str, Any], files: WeightFiles, *, where: str) -> None:
        """Compare its configuration and the shapes of its weights with the architecture.

        Raises:
            CheckpointError: it does not fit, with every reason; or a weight is missing or has another shape than its
                configuration implies.
        """
        self._files, self._where = files, where
        self._kind = _architecture(config, where)
        self.method = self._kind.method
        """Name of the training method that goes on with the model."""
        self._mask_id = config.get("mask_token_id") if self.method != "next_token" else None
        self._keys = _keys(config, self._kind, where)
        reasons = _reasons(self._keys, config, self._kind, files.shapes)
        if reasons:
            raise CheckpointError(f"{where} ({_name(config)}) cannot be a starting point: {'; '.join(reasons)}")
        files.check_layers(self._keys.num_hidden_layers, where=where, layers=self._kind.layers)
        self.model = _model(self._keys, self._kind, files.shapes, where)
        if others := self._kind.reasons_against(self.model):
            raise CheckpointError(
                f"{where} ({_name(config)}) cannot be a starting point, as its weights are of another architecture: "
                f"{'; '.join(others)}"
            )
        self._check_shapes()

    def vocab_size(self, tokenizer: Tokenizer) -> int:
        """Return the number of ids of the tokenizer.

        Raises:
            CheckpointError: it has far more or fewer ids than the embedding has, or another mask than a diffusion
                model's configuration, so it belongs to another model.
        """
        if self._mask_id not in (None, tokenizer.mask_id):
            raise CheckpointError(
                f"{self._where}: its mask_token_id is {shown(self._mask_id)}, but the mask of the tokenizer "
                f"{tokenizer.name} is {tokenizer.mask_id}; give the model's own tokenizer with --tokenizer"
            )
        rows = self._files.shapes[self._kind.stored(_EMBEDDING)][0]
        if not FEWEST_IDS * rows <= tokenizer.vocab_size <= rows + MOST_ADDED_IDS:
            raise CheckpointError(
                f"{self._where}: the tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} ids, the embedding "
                f"{rows:,} rows; give the model's own tokenizer with --tokenizer"
            )
        return tokenizer.vocab_size

    def read(self, tensor: TrainingTensor, *, mask: MaskRow | None = None) -> Tensor:
        """Return a training tensor without padding rows; rows that the checkpoint lacks are the mean of the others.

        Args:
            tensor: the tensor.
            mask: what to put in the mask's place of a table; None to leave it.
        """
        found = tensor.packed([self._files.read(self._kind.stored(name)) for name in tensor.released])
        if is_gain(tensor.released[0]):
            found = found.float() - 1.0
        if tensor.rows is None:
            return found
        stored = found
        if (missing := tensor.rows - len(stored)) > 0:
            found = torch.cat([stored, _mean_row(stored).expand(missing, -1)])
        if mask is not None:
            found = found.clone()
            found[mask.mask_id] = _mean_row(stored)[0] if mask.source == "mean" else found[mask.source]
        return found[: tensor.rows]

    def _check_shapes(self) -> None:
        """Compare every weight with the configuration; a weight left over belongs to another model."""
        shapes, kind = self._files.shapes, self._kind
        rows = shapes.get(kind.stored(_EMBEDDING), (0,))[0]
        left = {name for name in shapes if not _NOT_WEIGHTS.fullmatch(name)}
        if self._keys.tie_word_embeddings:
            left.discard(kind.stored("lm_head.weight"))
        for tensor in training_tensors(self.model, vocab_size=max(rows, 2)):
            for name, wanted in zip(tensor.released, tensor.released_shapes, strict=True):
                stored = kind.stored(name)
                if shapes.get(stored) != wanted:
                    found = f"has shape {shapes[stored]}" if stored in shapes else "is missing"
                    raise CheckpointError(
                        f"{self._where} requires {stored} of shape {wanted}, which {found}; fetch it again"
                    )
                left.discard(stored)
        if left:
            raise CheckpointError(
                f"{self._where} cannot be a starting point: its weights hold {shown(min(left))}, which this model lacks"
            )

    def dtype(self, tensor: TrainingTensor) -> torch.dtype:
        """Return the type to store a tensor in: float32 for offsets of gains, where w - 1 is exact; else as stored."""
        stored = self._files.dtype(self._kind.stored(tensor.released[0]))
        return torch.float32 if is_gain(tensor.released[0]) else stored


def _mean_row(table: Tensor) -> Tensor:
    """Return the mean of a table's rows, [1, hidden]."""
    return table.float().mean(0, keepdim=True).to(table.dtype)


def _architecture(config: Mapping[str, Any], where: str) -> Architecture:
    name = _name(config)
    if name.lower() in ARCHITECTURES:
        return ARCHITECTURES[name.lower()]
    raise CheckpointError(
        f"{where} ({name}) cannot be a starting point: models are read of the kinds {', '.join(ARCHITECTURES)} and gidd"
    )


def _keys(config: Mapping[str, Any], kind: Architecture, where: str) -> _Keys:
    given = {ours: config[theirs] for ours, theirs in kind.keys.items() if theirs in config}
    renamed = {**{key: value for key, value in config.items() if key not in kind.keys}, **given}
    missing = [kind.keys.get(key, key) for key in _NEEDED if renamed.get(key) is None]
    if missing:
        raise CheckpointError(
            f"{where} ({_name(config)}) cannot be a starting point: its config.json has no {', '.join(missing)}"
        )
    try:
        return _Keys.model_validate(renamed)
    except ValidationError as error:
        raise CheckpointError(
            f"{where} ({_name(config)}) cannot be a starting point: {first_complaint(error)}"
        ) from None


def _name(config: Mapping[str, Any]) -> str:
    found = config.get("model_type")
    return "no model_type" if found is None else shown(found).strip("'")


def _model(keys: _Keys, kind: Architecture, shapes: Mapping[str, tuple[int, ...]], where: str) -> ModelConfig:
    def has(name: str) -> bool:
        return kind.stored(f"model.layers.0.{name}") in shapes

    heads, hidden = keys.num_attention_heads, keys.hidden_size
    tree = {
        "layers": keys.num_hidden_layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": None if keys.num_key_value_heads == heads else keys.num_key_value_heads,
        "head_dim": keys.head_dim if keys.head_dim and keys.head_dim * heads != hidden else None,
        "seq_length": keys.max_position_embeddings,
        "ffn_hidden": keys.intermediate_size,
        "mlp": kind.mlp,
        "mlp_bias": has("mlp.down_proj.bias"),
        "qkv_bias": has("self_attn.q_proj.bias"),
        "attention_out_bias": has("self_attn.o_proj.bias"),
        "qk_norm": "head" if has("self_attn.q_norm.weight") else "none",
        "tie_embeddings": keys.tie_word_embeddings,
        "alignment": kind.alignment,
        "norm_eps": keys.rms_norm_eps,
        "rope_base": keys.theta,
        "rope_scaling": _scaling(keys),
    }
    try:
        return ModelConfig.model_validate(tree)
    except ValidationError as error:
        raise CheckpointError(f"{where} cannot be a starting point: {first_complaint(error)}") from None


def _scaling(keys: _Keys) -> dict[str, Any] | None:
    """Return `model.rope_scaling`; transformers counts from the length in the file where no original one is given."""
    if keys.rope_kind == "default":
        return None
    given = keys.rope.model_dump(exclude_none=True).items()
    found = {key: value for key, value in given if key in RopeScaling.model_fields} | {"type": keys.rope_kind}
    if keys.rope_kind != "linear":
        found["original_seq_length"] = keys.rope.original_max_position_embeddings or keys.max_position_embeddings
    return found


def _reasons(
    keys: _Keys, config: Mapping[str, Any], kind: Architecture, shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    heads, key_heads = keys.num_attention_heads, keys.num_key_value_heads or keys.num_attention_heads
    usual = ACTIVATIONS[kind.mlp][0]
    act = shown(keys.hidden_act or usual).strip(chr(39))
    query = kind.stored("model.layers.0.self_attn.q_proj.weight")
    is_gated = kind.stored("model.layers.0.mlp.gate_proj.weight") in shapes
    strange = [key for key, value in kind.fixed.items() if config.get(key, value) not in (value, None)]
    parts = {keys.partial_rotary_factor, keys.rope.partial_rotary_factor} - {None, 1.0}
    tests = {
        f"it has no {query}": query not in shapes,
        "its layers have experts": any(".experts." in name or ".router." in name for name in shapes),
        f"its activation is {act}{' with a gate' if is_gated else ''}, wanted the one of {kind.mlp}": (
            mlp_of(keys.hidden_act or usual, is_gated=is_gated) != kind.mlp
        ),
        "its norms are not RMSNorm (they have biases)": any(name.endswith("norm.bias") for name in shapes),
        f"its rotary embeddings are scaled ({keys.rope_kind}); known are linear, llama3 and yarn": (
            keys.rope_kind not in ("default", "linear", "llama3", "yarn")
            or (bool(kind.keys) and keys.rope_kind != "default")
        ),
        "its rotary embeddings turn a part of each head alone": bool(parts),
        "some of its layers have no rotary embeddings": not all(keys.no_rope_layers or [1]),
        "its attention slides": keys.slides(by_switch=kind.slides_by_switch),
        f"its {key_heads} key heads do not divide its {heads} heads": heads % key_heads != 0,
        **{f"its {key} is {shown(config.get(key))}, wanted {shown(kind.fixed[key])}": True for key in strange},
    }
    return [reason for reason, is_so in tests.items() if is_so]
