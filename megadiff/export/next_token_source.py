"""Autoregressive checkpoints whose blocks this model can represent exactly, as a starting point for training.

The model here is a pre-norm Transformer with RMSNorm, rotary embeddings over the whole head, an MLP of two matrices
around relu^2, and as many key heads as query heads. A checkpoint with Llama's tensor names fits if it has the same
architecture: `arcee` does; grouped key heads are repeated, a tied head is copied, a plain gain w becomes the offset
w - 1, and per-head query and key norms (Qwen 3) are kept. Llama, Mistral and Qwen themselves do not fit: their MLP is
gated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import CheckpointError, shown
from megadiff.export.released_config import first_complaint
from megadiff.export.weight_files import TrainingTensor, WeightFiles, training_tensors
from megadiff.model.config import ModelConfig

_NAMES = {"attn_layernorm": "input_layernorm", "mlp_layernorm": "post_attention_layernorm"}
_NORMS = ("layernorm.weight", "model.norm.weight", "_norm.weight")
_NOT_WEIGHTS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Names of tables that older programs store beside the weights and that follow from the configuration."""

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")

MOST_ADDED_IDS = 128
"""Maximal number of ids that a tokenizer may have beyond the embedding's, such as a mask; they get its mean row."""


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
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    rope_theta: float | None = Field(default=None, ge=1, lt=2**53)
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    layer_types: list[str] | None = None
    use_sliding_window: bool | None = None
    sliding_window: int | None = None

    @property
    def key_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def theta(self) -> float:
        """Base of the rotary frequencies; 0 if the given value is not a number."""
        found = self.rope_theta or (self.rope_parameters or {}).get("rope_theta", 10000.0)
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        return found if is_number and 1 <= found < 2**53 else 0.0

    @property
    def rope_kind(self) -> str:
        """Kind of scaling of the rotary frequencies; `default` for none."""
        rope = self.rope_scaling or self.rope_parameters or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        return shown(kind).strip("'")

    @property
    def slides(self) -> bool:
        """Whether some layers attend only to a sliding window."""
        if self.layer_types:
            return "sliding_attention" in self.layer_types
        return self.use_sliding_window is not False and bool(self.sliding_window)


class NextTokenSource:
    """A checkpoint with Llama's tensor names that fits, read as tensors of this model."""

    def __init__(self, config: Mapping[str, Any], files: WeightFiles, *, where: str) -> None:
        """Compare its configuration and the shapes of its weights with the architecture of this model.

        Raises:
            CheckpointError: it does not fit, with every reason; or a weight is missing or has another shape than its
                configuration implies.
        """
        self._files, self._where = files, where
        self._keys = _keys(config, where)
        reasons = _reasons(self._keys, files.shapes)
        if reasons:
            raise CheckpointError(
                f"{where} ({_kind(config)}) cannot be a starting point: {'; '.join(reasons)}. What fits has RMSNorm "
                "before each branch, full rotary embeddings, and an ungated relu^2 MLP, as arcee has"
            )
        files.check_layers(self._keys.num_hidden_layers, where=where)
        self.model = _model(self._keys, files.shapes, where)
        self._check_shapes()

    def vocab_size(self, tokenizer: Tokenizer) -> int:
        """Return the number of ids of the tokenizer.

        Raises:
            CheckpointError: it has far more ids than the embedding has rows, so it belongs to another model.
        """
        rows = self._files.shapes["model.embed_tokens.weight"][0]
        if tokenizer.vocab_size > rows + MOST_ADDED_IDS:
            raise CheckpointError(
                f"{self._where}: the tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} ids, the embedding "
                f"{rows:,} rows; give the model's own tokenizer with --tokenizer"
            )
        return tokenizer.vocab_size

    def read(self, tensor: TrainingTensor) -> Tensor:
        """Return a training tensor without padding rows; rows that the checkpoint lacks are the mean of the others."""
        parts = [self._part(name) for name in tensor.released]
        if tensor.heads:
            rows = [part.unflatten(0, (tensor.heads, -1)) for part in parts]
            return torch.stack(rows, dim=1).flatten(0, 2)
        found = parts[0].float() - 1.0 if tensor.released[0].endswith(_NORMS) else parts[0]
        missing = (tensor.rows or 0) - len(found)
        if missing > 0:
            found = torch.cat([found, found.float().mean(0, keepdim=True).to(found.dtype).expand(missing, -1)])
        return found if tensor.rows is None else found[: tensor.rows]

    def _part(self, name: str) -> Tensor:
        found = self._files.read(self._stored_name(name))
        heads, groups = self._keys.num_attention_heads, self._keys.key_heads
        if self._is_grouped(name):
            found = found.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, dim=0).flatten(0, 1)
        return found

    def _stored_name(self, name: str) -> str:
        if name == "lm_head.weight" and self._keys.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        return name

    def _is_grouped(self, name: str) -> bool:
        return name.endswith(("k_proj.weight", "v_proj.weight")) and self._keys.key_heads != (
            self._keys.num_attention_heads
        )

    def _check_shapes(self) -> None:
        """Compare every weight with the configuration; a weight left over belongs to another model."""
        shapes, keys = self._files.shapes, self._keys
        rows = shapes.get("model.embed_tokens.weight", (0,))[0]
        left = {name for name in shapes if not _NOT_WEIGHTS.fullmatch(name)}
        if keys.tie_word_embeddings:
            left.discard("lm_head.weight")
        for tensor in training_tensors(self.model, vocab_size=max(rows, 2)):
            for name in tensor.released:
                wanted = tensor.released_shape
                if self._is_grouped(name):
                    wanted = (wanted[0] // keys.num_attention_heads * keys.key_heads, *wanted[1:])
                stored = self._stored_name(name)
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


def next_token_dtype(tensor: TrainingTensor, stored: torch.dtype) -> torch.dtype:
    """Return the type to store a tensor in: float32 for offsets of gains, where w - 1 is exact; else as stored."""
    return torch.float32 if tensor.released[0].endswith(_NORMS) else stored


def _keys(config: Mapping[str, Any], where: str) -> _Keys:
    missing = [key for key in _NEEDED if config.get(key) is None]
    if missing:
        why = f"its config.json has no {', '.join(missing)}"
        raise CheckpointError(
            f"{where} ({_kind(config)}) cannot be a starting point: {why}. What fits has RMSNorm before each branch, "
            "full rotary embeddings, and an ungated relu^2 MLP, as arcee has"
        )
    try:
        return _Keys.model_validate(config)
    except ValidationError as error:
        raise CheckpointError(
            f"{where} ({_kind(config)}) cannot be a starting point: {first_complaint(error)}"
        ) from None


def _kind(config: Mapping[str, Any]) -> str:
    found = config.get("model_type")
    return "no model_type" if found is None else shown(found).strip("'")


def _model(keys: _Keys, shapes: Mapping[str, tuple[int, ...]], where: str) -> ModelConfig:
    try:
        return ModelConfig.model_validate(
            {
                "layers": keys.num_hidden_layers,
                "hidden": keys.hidden_size,
                "heads": keys.num_attention_heads,
                "seq_length": keys.max_position_embeddings,
                "ffn_multiple": keys.intermediate_size // keys.hidden_size,
                "mlp_bias": "model.layers.0.mlp.up_proj.bias" in shapes,
                "qk_norm": "head" if "model.layers.0.self_attn.q_norm.weight" in shapes else "none",
                "norm_eps": keys.rms_norm_eps,
                "rope_base": int(keys.theta),
            }
        )
    except ValidationError as error:
        raise CheckpointError(f"{where} cannot be a starting point: {first_complaint(error)}") from None


def _reasons(keys: _Keys, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    hidden, heads, ffn = keys.hidden_size, keys.num_attention_heads, keys.intermediate_size
    head_dim = keys.head_dim or hidden // heads
    has_norms = "model.layers.0.post_attention_layernorm.weight" in shapes
    tests = {
        "it has no model.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.weight" not in shapes,
        "its MLP is gated (gate_proj)": any(".gate_proj." in name for name in shapes),
        f"its activation is {shown(keys.hidden_act).strip(chr(39))}, not relu2": (
            keys.hidden_act not in ("relu2", "relu_squared")
        ),
        "its layers have experts": any(".experts." in name or ".router." in name for name in shapes),
        "it has no RMSNorm before the MLP (post_attention_layernorm)": not has_norms,
        "its norms are not RMSNorm (they have biases)": any(name.endswith("layernorm.bias") for name in shapes),
        "its attention has biases": any(".self_attn." in name and name.endswith("_proj.bias") for name in shapes),
        f"its rotary embeddings are scaled ({keys.rope_kind})": keys.rope_kind != "default",
        "its rotary base is no whole number of at least 1": keys.theta < 1 or keys.theta != int(keys.theta),
        "its rotary embeddings turn a part of each head alone": keys.partial_rotary_factor != 1.0,
        "its attention slides": keys.slides,
        f"its heads are {head_dim} wide, not hidden_size / heads": head_dim * heads != hidden,
        f"its {keys.key_heads} key heads do not divide its {heads} heads": heads % keys.key_heads != 0,
        f"its MLP width {ffn} is no multiple of its width {hidden}": ffn % hidden != 0,
    }
    return [reason for reason, is_so in tests.items() if is_so]
