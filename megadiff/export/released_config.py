"""`config.json` of the released `dvruette/gidd-*` layout, from a run's settings and back.

Keys that the released files lack stand for what they cannot say; their absence means what those files mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megadiff.checkpoint.manifest import Manifest
from megadiff.data.tokenizers import Tokenizer
from megadiff.diffusion.config import ConditioningConfig, NoiseConfig
from megadiff.diffusion.snr import rate_from
from megadiff.errors import CheckpointError
from megadiff.model.config import ModelConfig

CLASS = "GiddForDiffusionLM"
AUTO_MAP = {
    "AutoConfig": "configuration_gidd.GiddConfig",
    "AutoModel": "modeling_gidd.GiddModel",
    "AutoModelForCausalLM": f"modeling_gidd.{CLASS}",
    "AutoModelForMaskedLM": f"modeling_gidd.{CLASS}",
}

_COMPLETEP_RESID, _COMPLETEP_HEAD = 4.0, 512.0


def config_of(manifest: Manifest, tokenizer: Tokenizer, *, dtype: str) -> dict[str, Any]:
    """The whole `config.json` of a run's checkpoint.

    Args:
        dtype: `bfloat16` or `float32`, of the weights beside it.
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
        **_noise_keys(NoiseConfig.model_validate(manifest.config["noise"])),
        "is_causal": manifest.config["objective"]["name"] == "ar",
        "prompt_attention": _prompt_attention(manifest.config["conditioning"]),
    }


def model_keys(model: ModelConfig) -> dict[str, Any]:
    """The keys that say what is computed."""
    return {
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_hidden,
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
        "tie_word_embeddings": False,
        "rope_theta": float(model.rope_base),
        "rope_scaling": None,
        "attn_performer": "eager",
    }


def model_from(config: Mapping[str, Any], *, where: str) -> ModelConfig:
    """The model section that a `config.json` of this layout means.

    Raises:
        CheckpointError: a key is missing or asks for what this model has not.
    """
    try:
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        ffn = int(config.get("intermediate_size") or 4 * hidden)
        resid, head = config.get("resid_scale", _COMPLETEP_RESID), config.get("head_scaling")
        theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 10000)
        init = config.get("init_scale")
        full = "full" if config.get("use_qk_norm", True) else "none"
        tree = {
            "layers": layers,
            "hidden": hidden,
            "heads": config["num_attention_heads"],
            "seq_length": config["max_position_embeddings"],
            "ffn_multiple": _whole(ffn / hidden, "intermediate_size / hidden_size"),
            "mlp_bias": config.get("mlp_bias", True),
            "qk_norm": config.get("qk_norm") or full,
            "sink": config.get("attention_bias", True),
            "softcap": config.get("attn_soft_cap", 30.0),
            "resid_scale": "completep" if resid == _COMPLETEP_RESID else resid / layers,
            "head_scale": "completep" if head in (None, _COMPLETEP_HEAD / hidden) else head,
            "norm_eps": config.get("rms_norm_eps", 1e-6),
            "rope_base": _whole(theta, "rope_theta"),
            "init_scale": 0.4 if init is None else round(init * math.sqrt(hidden), 12),
            "embed_init": config.get("emb_init_scale", 0.02),
            "head_init": config.get("head_init_scale", 0.0),
        }
        model = ModelConfig.model_validate(tree)
    except KeyError as error:
        raise CheckpointError(f"{where} has no {error.args[0]}, which every such model needs; fetch it again") from None
    except (ValidationError, TypeError, ValueError, ZeroDivisionError) as error:
        last = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{where} describes a model that cannot be trained here: {last}") from None
    _refuse_other_models(config, model, where)
    return model


def noise_from(config: Mapping[str, Any]) -> NoiseConfig:
    """The noise that a `config.json` of this layout means."""
    if config.get("noise_p_uniform") is not None:
        return NoiseConfig(form="time", p_uniform=config["noise_p_uniform"], gamma=config.get("noise_gamma", 1.0))
    return NoiseConfig(
        shift=float(config.get("noise_type", 0.0)),
        scale=config.get("noise_scale", 1.0),
        min_log_snr=config.get("min_log_snr", -9.0),
        max_log_snr=config.get("max_log_snr", 9.0),
    )


def conditioning_from(config: Mapping[str, Any]) -> ConditioningConfig:
    """How prompts attend; a released file means the paper's preset."""
    attention = config.get("prompt_attention")
    if attention == "full":
        return ConditioningConfig()
    if attention is None:
        return ConditioningConfig(preset="as_released")
    return ConditioningConfig.model_validate({"prompt": 0.2, "prompt_attention": attention})


def _noise_keys(noise: NoiseConfig) -> dict[str, Any]:
    rate = rate_from(noise)
    levels = {"min_log_snr": rate.min_log_snr, "max_log_snr": rate.max_log_snr}
    if noise.form == "snr":
        return {"noise_type": noise.shift_value, "noise_scale": noise.scale, **levels}
    if noise.p_uniform == 0:
        return {"noise_type": -1000.0, "noise_scale": 1.0, "noise_p_uniform": 0.0, "noise_gamma": noise.gamma, **levels}
    return {"noise_p_uniform": noise.p_uniform, "noise_gamma": noise.gamma, **levels}


def _prompt_attention(conditioning: Mapping[str, Any]) -> str:
    return conditioning["prompt_attention"] if conditioning["prompt"] > 0 else "full"


def _times_layers(model: ModelConfig) -> float:
    """The number whose quotient by `layers` is the residual factor to the last bit."""
    if model.resid_scale == "completep":
        return _COMPLETEP_RESID
    near = model.resid_factor * model.layers
    tried = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((value for value in tried if value / model.layers == model.resid_factor), near)


def _whole(value: float, key: str) -> int:
    if value != int(value) or value < 1:
        raise ValueError(f"{key} is {value}, wanted a whole number")
    return int(value)


def _refuse_other_models(config: Mapping[str, Any], model: ModelConfig, where: str) -> None:
    scaling = config.get("rope_scaling")
    wrong = {
        "weight_scaling": config.get("weight_scaling", 1.0) != 1.0,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        "rope_scaling": bool(scaling)
        and (not isinstance(scaling, Mapping) or scaling.get("rope_type", "default") != "default"),
        "head_dim": config.get("head_dim") not in (None, model.head_dim),
    }
    for key, is_wrong in wrong.items():
        if is_wrong:
            raise CheckpointError(f"{where} describes a model that cannot be trained here: {key} is {config[key]!r}")
