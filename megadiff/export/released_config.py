"""Conversion between a run's settings and the `config.json` of the released `dvruette/gidd-*` layout.

Keys that the released files lack express what those cannot; if absent, they default to those files' meaning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megadiff.checkpoint.manifest import Manifest
from megadiff.data.tokenizers import Tokenizer
from megadiff.diffusion import exact
from megadiff.diffusion.config import ConditioningConfig, NoiseConfig, noise_config
from megadiff.diffusion.noise_process import NoiseProcess, build_process
from megadiff.diffusion.processes.gidd_snr import GiddSnr
from megadiff.diffusion.processes.gidd_time import GiddTime
from megadiff.errors import CheckpointError, shown
from megadiff.export.architectures import ACTIVATIONS, mlp_of
from megadiff.model.config import ModelConfig

CLASS = "GiddForDiffusionLM"
AUTO_MAP = {
    "AutoConfig": "configuration_gidd.GiddConfig",
    "AutoModel": "modeling_gidd.GiddModel",
    "AutoModelForCausalLM": f"modeling_gidd.{CLASS}",
    "AutoModelForMaskedLM": f"modeling_gidd.{CLASS}",
}

_COMPLETEP_RESID, _COMPLETEP_HEAD = 4.0, 512.0
_TABLE_STEP = 0.05


def config_of(manifest: Manifest, tokenizer: Tokenizer, use: Mapping[str, Any], *, dtype: str) -> dict[str, Any]:
    """Return the whole `config.json` of a run's checkpoint.

    Args:
        manifest: the checkpoint's manifest.
        tokenizer: the run's tokenizer.
        use: the keys that say how the model is used (`Method.export_config`).
        dtype: type of the weights beside it, `bfloat16` or `float32`.
    """
    model = ModelConfig.model_validate(manifest.config["model"])
    return {
        "architectures": [CLASS],
        "auto_map": AUTO_MAP,
        "model_type": "gidd",
        "torch_dtype": dtype,
        "vocab_size": manifest.vocab_size,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "mask_token_id": manifest.mask_id,
        **model_keys(model),
        **_noise_keys(noise_config(**manifest.config["noise"])),
        "prepended_bos": manifest.prepended_bos,
        **use,
    }


def model_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the keys that define the computation."""
    return {
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "head_dim": model.head_width,
        "intermediate_size": model.mlp_width,
        "max_position_embeddings": model.seq_length,
        "resid_scale": _times_layers(model),
        "head_scaling": model.head_factor,
        "weight_scaling": 1.0,
        "init_scale": model.init_scale / math.sqrt(model.hidden),
        "emb_init_scale": model.embed_init,
        "head_init_scale": model.head_init,
        "attn_soft_cap": model.softcap,
        "rms_norm_eps": model.norm_eps,
        "use_qk_norm": model.qk_norm != "none",
        "qk_norm": model.qk_norm,
        "attention_bias": model.sink,
        "mlp_bias": model.mlp_bias,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": float(model.rope_base),
        "rope_scaling": None,
        "attn_performer": "eager",
        **_other_blocks(model),
    }


def _other_blocks(model: ModelConfig) -> dict[str, Any]:
    """Return the keys that the released files lack, where the model differs from theirs."""
    activation, is_gated = ACTIVATIONS[model.mlp]
    keys = {
        "num_key_value_heads": (model.key_heads, model.heads),
        "hidden_act": (activation, "relu2"),
        "gated_mlp": (is_gated, False),
        "qkv_bias": (model.qkv_bias, False),
        "attention_out_bias": (model.attention_out_bias, False),
        "rotary_scaling": (None if model.rope_scaling is None else model.rope_scaling.model_dump(), None),
        "alignment": (model.alignment, "same"),
    }
    return {key: value for key, (value, released) in keys.items() if value != released}


class ReleasedConfig(BaseModel):
    """The keys of a `config.json` of this layout that define the computation, with defaults for absent ones.

    Types are strict and every number is finite and bounded, so that nothing is built or allocated from a value that no
    such model has. Other keys are not read.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    vocab_size: int = Field(gt=1, lt=2**31)
    mask_token_id: int = Field(default=3, ge=0, lt=2**31)
    hidden_size: int = Field(gt=0, le=2**20)
    num_hidden_layers: int = Field(gt=0, le=2**16)
    num_attention_heads: int = Field(gt=0, le=2**16)
    intermediate_size: int | None = Field(default=None, gt=0, le=2**24)
    head_dim: int | None = Field(default=None, gt=0, le=2**20)
    max_position_embeddings: int = Field(gt=0, lt=2**31)
    resid_scale: float = _COMPLETEP_RESID
    head_scaling: float | None = None
    weight_scaling: float = 1.0
    init_scale: float | None = Field(default=None, ge=0)
    emb_init_scale: float = Field(default=0.02, ge=0)
    head_init_scale: float = Field(default=0.0, ge=0)
    attn_soft_cap: float | None = Field(default=30.0, gt=0)
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    use_qk_norm: bool = True
    qk_norm: Literal["full", "head", "none"] | None = None
    num_key_value_heads: int | None = Field(default=None, gt=0, le=2**16)
    hidden_act: Literal["relu2", "gelu", "silu"] = "relu2"
    gated_mlp: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    rotary_scaling: dict[str, Any] | None = None
    alignment: Literal["same", "shifted"] = "same"
    attention_bias: bool = True
    mlp_bias: bool = True
    tie_word_embeddings: bool = False
    is_causal: bool = False
    rope_theta: float | None = Field(default=None, ge=1, lt=2**53)
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    noise_type: float = 0.0
    noise_scale: float = Field(default=1.0, gt=0, le=1)
    noise_p_uniform: float | None = Field(default=None, ge=0, lt=1)
    noise_gamma: float = Field(default=1.0, gt=0, le=2)
    noise_table: dict[str, Any] | None = None
    min_log_snr: float = Field(default=-9.0, ge=-50, le=50)
    max_log_snr: float = Field(default=9.0, ge=-50, le=50)
    prompt_attention: Literal["block", "causal", "full"] | None = None


def read_released(config: Mapping[str, Any], *, where: str) -> ReleasedConfig:
    """Check the keys of a `config.json` of this layout.

    Args:
        config: the file's object.
        where: the file, for messages.

    Raises:
        CheckpointError: a key is missing, or has a value that no such model has; in one sentence.
    """
    try:
        return ReleasedConfig.model_validate(config)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {first_complaint(error)}; fetch it again") from None


def first_complaint(error: ValidationError) -> str:
    """Return the first error about the keys of a file: key, rule, and a shortened form of the value found."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "extra_forbidden":
        return f"the key {shown(key)[1:-1]} is unknown"
    if (own := first.get("ctx", {}).get("error")) is not None:
        return str(own)
    rule = first["msg"].replace("Input should be a valid", "must be a").replace("Input should", "must")
    return f"{shown(key)[1:-1]} {rule.replace('be a integer', 'be an integer')}, found {shown(first['input'])}"


def model_from(config: ReleasedConfig, *, where: str) -> ModelConfig:
    """Return the model section that corresponds to a `config.json` of this layout.

    Args:
        config: its keys.
        where: the file, for messages.

    Raises:
        CheckpointError: a key requires something that this model does not have.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    resid, head, init = config.resid_scale, config.head_scaling, config.init_scale
    tree = {
        "layers": layers,
        "hidden": hidden,
        "heads": config.num_attention_heads,
        "seq_length": config.max_position_embeddings,
        "mlp_bias": config.mlp_bias,
        "qk_norm": config.qk_norm or ("full" if config.use_qk_norm else "none"),
        "sink": config.attention_bias,
        "softcap": config.attn_soft_cap,
        "resid_scale": "completep" if resid == _COMPLETEP_RESID else resid / layers,
        "head_scale": "completep" if head in (None, _COMPLETEP_HEAD / hidden) else head,
        "norm_eps": config.rms_norm_eps,
        "init_scale": 0.4 if init is None else round(init * math.sqrt(hidden), 12),
        "embed_init": config.emb_init_scale,
        "head_init": config.head_init_scale,
        "alignment": config.alignment,
    }
    try:
        tree |= _mlp_of(config) | _attention_of(config)
        tree["rope_base"] = _rope_theta(config)
        model = ModelConfig.model_validate(tree)
    except ValueError as error:
        why = first_complaint(error) if isinstance(error, ValidationError) else str(error)
        raise CheckpointError(f"{where} describes a model that cannot be trained here: {why}") from None
    _refuse_other_models(config, where)
    return model


def _mlp_of(config: ReleasedConfig) -> dict[str, Any]:
    hidden, width = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
    mlp = mlp_of(config.hidden_act, is_gated=config.gated_mlp)
    if mlp is None:
        raise ValueError(f"hidden_act is {config.hidden_act} with gated_mlp={config.gated_mlp}")
    return {"mlp": mlp, **({"ffn_hidden": width} if width % hidden else {"ffn_multiple": width // hidden})}


def _attention_of(config: ReleasedConfig) -> dict[str, Any]:
    heads = config.num_attention_heads
    is_usual = config.head_dim is None or config.head_dim * heads == config.hidden_size
    return {
        "kv_heads": None if config.num_key_value_heads == heads else config.num_key_value_heads,
        "head_dim": None if is_usual else config.head_dim,
        "qkv_bias": config.qkv_bias,
        "attention_out_bias": config.attention_out_bias,
        "tie_embeddings": config.tie_word_embeddings,
        "rope_scaling": config.rotary_scaling,
    }


def noise_from(config: ReleasedConfig, *, where: str) -> NoiseConfig:
    """Return the noise that corresponds to a `config.json` of this layout.

    Raises:
        CheckpointError: there is no such noise.
    """
    try:
        if config.noise_p_uniform is not None:
            return noise_config(process="gidd_time", p_uniform=config.noise_p_uniform, gamma=config.noise_gamma)
        return noise_config(
            shift=config.noise_type,
            scale=config.noise_scale,
            min_log_snr=config.min_log_snr,
            max_log_snr=config.max_log_snr,
        )
    except ValidationError as error:
        raise CheckpointError(f"{where} describes noise that does not exist: {first_complaint(error)}") from None


def conditioning_from(config: ReleasedConfig) -> ConditioningConfig:
    """Return the attention of prompts; a released file implies the paper's preset."""
    attention = config.prompt_attention
    if attention == "full":
        return ConditioningConfig()
    if attention is None:
        return ConditioningConfig(preset="as_released")
    return ConditioningConfig.model_validate({"prompt": 0.2, "prompt_attention": attention})


def agree(config: Mapping[str, Any], noise: NoiseConfig, conditioning: ConditioningConfig) -> bool:
    """Return whether a `config.json` has the same noise and prompt attention as these sections."""
    keys = {**_noise_keys(noise), "prompt_attention": conditioning.trained_prompt_attention}
    given = {key: config.get(key) for key in keys} | {"noise_p_uniform": config.get("noise_p_uniform")}
    return given == {"noise_p_uniform": None, **keys}


def _noise_keys(noise: NoiseConfig) -> dict[str, Any]:
    """Return the keys about the noise: the released ones where they can express it, else a table of it."""
    process = build_process(noise, vocab_size=2, mask_id=0)  # the keys hold for any vocabulary
    levels = {"min_log_snr": process.schedule.min_log_snr, "max_log_snr": process.schedule.max_log_snr}
    law = process.law
    if isinstance(law, GiddSnr):
        return {"noise_type": law.shift, "noise_scale": law.scale, **levels}
    if isinstance(law, GiddTime) and law.p_uniform > 0:
        return {"noise_p_uniform": law.p_uniform, "noise_gamma": law.gamma, **levels}
    if isinstance(law, GiddTime):
        return {"noise_type": -1000.0, "noise_scale": 1.0, "noise_p_uniform": 0.0, "noise_gamma": law.gamma, **levels}
    return {"noise_table": _noise_table(process), **levels}


def _noise_table(process: NoiseProcess) -> dict[str, Any]:
    """Return logit u and its slope at equal steps of log-SNR over the range of sampling.

    `generation_gidd.TableNoise` interpolates them by cubic polynomials. The steps are those of `_TABLE_STEP` or a
    little less, at which the error of a law that varies over a unit of log-SNR is below 1e-7.
    """
    low, high = process.sampling_range
    log_snr = np.linspace(low, high, math.ceil((high - low) / _TABLE_STEP) + 1)
    logit = process.law.logit_u(log_snr, exact)
    slope = process.law.dlogit_u(log_snr, exact) + np.zeros_like(log_snr)
    return {"min_log_snr": low, "max_log_snr": high, "logit_u": logit.tolist(), "dlogit_u": slope.tolist()}


def _times_layers(model: ModelConfig) -> float:
    """Return the number whose quotient by `layers` is the residual factor to the last bit."""
    if model.resid_scale == "completep":
        return _COMPLETEP_RESID
    near = model.resid_factor * model.layers
    tried = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((value for value in tried if value / model.layers == model.resid_factor), near)


def _rope_theta(config: ReleasedConfig) -> float:
    found = config.rope_theta or (config.rope_parameters or {}).get("rope_theta", 10000.0)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 1 <= found < 2**53:
        raise ValueError(f"rope_theta is {shown(found)}, wanted a number of at least 1")
    return float(found)


def _refuse_other_models(config: ReleasedConfig, where: str) -> None:
    scaling = config.rope_scaling or config.rope_parameters or {}
    wrong = {
        "weight_scaling": config.weight_scaling != 1.0,
        "rope_scaling": scaling.get("rope_type", "default") != "default",
    }
    for key, is_wrong in wrong.items():
        if is_wrong:
            found = shown(scaling.get("rope_type") if key == "rope_scaling" else getattr(config, key))
            raise CheckpointError(f"{where} describes a model that cannot be trained here: {key} is {found}")
