"""Autoregressive checkpoints whose blocks this model can hold exactly, as a place to start from.

The model here is a pre-norm Transformer with RMSNorm, rotary embeddings over the whole head, an MLP of two matrices
around relu^2, and as many key heads as query heads. A checkpoint in the Llama naming fits if it is that too: `arcee`
does; grouped key heads are repeated, a tied head is copied, a plain gain w becomes the offset w - 1, and per-head query
and key norms (Qwen 3) are kept. Llama, Mistral and Qwen themselves do not fit: their MLP is gated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megadiff.errors import CheckpointError
from megadiff.export.weight_files import WeightFiles
from megadiff.export.weights import TrainingTensor
from megadiff.model.config import ModelConfig

_NAMES = {"attn_layernorm": "input_layernorm", "mlp_layernorm": "post_attention_layernorm"}
_NORMS = ("layernorm.weight", "model.norm.weight", "_norm.weight")


def next_token_model(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, where: str) -> ModelConfig:
    """The model section that holds this checkpoint.

    Raises:
        CheckpointError: with every reason why none does.
    """
    reasons = _reasons(config, shapes)
    if reasons:
        raise CheckpointError(
            f"{where} ({config.get('model_type', 'no model_type')}) cannot be a starting point: {'; '.join(reasons)}. "
            "What fits has RMSNorm before each branch, full rotary embeddings, and an ungated relu^2 MLP, as arcee has"
        )
    hidden = config["hidden_size"]
    try:
        return ModelConfig.model_validate(
            {
                "layers": config["num_hidden_layers"],
                "hidden": hidden,
                "heads": config["num_attention_heads"],
                "seq_length": config["max_position_embeddings"],
                "ffn_multiple": config["intermediate_size"] // hidden,
                "mlp_bias": "model.layers.0.mlp.up_proj.bias" in shapes,
                "qk_norm": "head" if "model.layers.0.self_attn.q_norm.weight" in shapes else "none",
                "norm_eps": config.get("rms_norm_eps", 1e-6),
                "rope_base": int(_theta(config)),
            }
        )
    except ValidationError as error:
        raise CheckpointError(f"{where} cannot be a starting point: {str(error).splitlines()[-2].strip()}") from None


def read_next_token(tensor: TrainingTensor, files: WeightFiles, config: Mapping[str, Any]) -> Tensor:
    """One training tensor, without dead rows; rows the checkpoint lacks (a mask added) are the mean of the others."""
    parts = [_part(name, files, config) for name in tensor.released]
    if tensor.heads:
        rows = [part.unflatten(0, (tensor.heads, -1)) for part in parts]
        return torch.stack(rows, dim=1).flatten(0, 2)
    found = parts[0].float() - 1.0 if tensor.released[0].endswith(_NORMS) else parts[0]
    missing = (tensor.rows or 0) - len(found)
    if missing > 0:
        found = torch.cat([found, found.float().mean(0, keepdim=True).to(found.dtype).expand(missing, -1)])
    return found if tensor.rows is None else found[: tensor.rows]


def next_token_dtype(tensor: TrainingTensor, stored: torch.dtype) -> torch.dtype:
    """Offsets of gains are kept in float32, where w - 1 is exact; the rest as it is stored."""
    return torch.float32 if tensor.released[0].endswith(_NORMS) else stored


def _part(name: str, files: WeightFiles, config: Mapping[str, Any]) -> Tensor:
    if name == "lm_head.weight" and config.get("tie_word_embeddings"):
        name = "model.embed_tokens.weight"
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    found = files.read(name)
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if name.endswith(("k_proj.weight", "v_proj.weight")) and groups != heads:
        found = found.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, dim=0).flatten(0, 1)
    return found


def _theta(config: Mapping[str, Any]) -> float:
    return config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)


def _reasons(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    missing = [key for key in needed if not isinstance(config.get(key), int)]
    if missing:
        return [f"its config.json has no {', '.join(missing)}"]
    hidden, heads, ffn = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    activation, head_dim = config.get("hidden_act"), config.get("head_dim") or hidden // heads
    has_norms = "model.layers.0.post_attention_layernorm.weight" in shapes
    tests = {
        "it has no model.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.weight" not in shapes,
        "its MLP is gated (gate_proj)": any(".gate_proj." in name for name in shapes),
        f"its activation is {activation}, not relu2": activation not in ("relu2", "relu_squared"),
        "its layers have experts": any(".experts." in name or ".router." in name for name in shapes),
        "it has no RMSNorm before the MLP (post_attention_layernorm)": not has_norms,
        "its norms are not RMSNorm (they have biases)": any(name.endswith("layernorm.bias") for name in shapes),
        "its attention has biases": any(".self_attn." in name and name.endswith("_proj.bias") for name in shapes),
        f"its rotary embeddings are scaled ({_rope_kind(config)})": _rope_kind(config) != "default",
        "its rotary base is no whole number": _theta(config) != int(_theta(config)),
        "its rotary embeddings turn a part of each head alone": config.get("partial_rotary_factor", 1.0) != 1.0,
        "its attention slides": _slides(config),
        f"its heads are {head_dim} wide, not hidden_size / heads": head_dim * heads != hidden,
        f"its MLP width {ffn} is no multiple of its width {hidden}": ffn % hidden != 0,
    }
    return [reason for reason, is_so in tests.items() if is_so]


def _rope_kind(config: Mapping[str, Any]) -> str:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return rope.get("rope_type", rope.get("type", "default"))


def _slides(config: Mapping[str, Any]) -> bool:
    if config.get("layer_types"):
        return "sliding_attention" in config["layer_types"]
    return bool(config.get("use_sliding_window", True)) and bool(config.get("sliding_window"))
