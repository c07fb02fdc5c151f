"""Public architectures whose blocks this model can represent: names of tensors and of keys, for import and export.

All of them normalise before each branch with RMSNorm, rotate whole heads, halves paired, and store a gain w where this
package stores the offset w - 1. They differ in names, biases, norms of queries and keys, and in what they predict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megadiff.errors import ConfigError, shown
from megadiff.model.config import ModelConfig

ACTIVATIONS = {
    "relu2": ("relu2", False),
    "gelu": ("gelu", False),
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
}
"""Activation, as in the key `hidden_act`, and whether it gates a further matrix, by the name in `model.mlp`."""


def mlp_of(hidden_act: str, *, is_gated: bool) -> str | None:
    """Return the name in `model.mlp` of an activation; None if there is none."""
    wanted = ("relu2" if hidden_act == "relu_squared" else hidden_act, is_gated)
    return next((name for name, found in ACTIVATIONS.items() if found == wanted), None)


@dataclass(frozen=True)
class Architecture:
    """One public architecture."""

    model_class: str
    """Name of its class, as in the key `architectures`."""
    method: Literal["next_token", "gidd"]
    """Training method whose predictions its own are."""
    names: Mapping[str, str]
    """Parts of the names of released tensors, and what stands there instead."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Keys of its `config.json`, where they differ from Llama's."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of its `config.json` that models of this kind have with these values."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Keys that an export writes besides, and an import does not read."""
    vocabulary: tuple[str, ...] = ("vocab_size",)
    """Keys of the number of rows of its tables."""
    model_type: str | None = None
    """The key `model_type` of its `config.json`, where that is not its key in `ARCHITECTURES`."""
    mlp: str = "swiglu"
    """Value of `model.mlp`."""
    qk_norm: Literal["head", "none"] = "none"
    """Value of `model.qk_norm`."""
    alignment: Literal["same", "shifted"] = "same"
    """Value of `model.alignment`; autoregressive models, whose method moves the tokens, have `same`."""
    biases: frozenset[frozenset[str]] = frozenset({frozenset()})
    """Combinations of biases that it can have, of `qkv`, `out` and `mlp`."""
    slides_by_switch: bool = False
    """Whether a sliding window has an effect with `use_sliding_window` alone."""
    needs_own_code: bool = False
    """Whether transformers has no class of it, so that folders need the architecture's own code beside them."""

    def stored(self, released: str) -> str:
        """Return the name that a released tensor has in this architecture."""
        for ours, theirs in self.names.items():
            released = released.replace(ours, theirs)
        return released

    @property
    def layers(self) -> re.Pattern[str]:
        """Pattern of the names of a layer's tensors, whose first group is the layer's number."""
        return re.compile(re.escape(self.stored("model.layers.")) + r"(\d+)\.")

    def reasons_against(self, model: ModelConfig) -> list[str]:
        """Return why a model cannot be stored in this architecture; empty if it can."""
        biases = {"qkv": model.qkv_bias, "out": model.attention_out_bias, "mlp": model.mlp_bias}
        found = frozenset(name for name, has_it in biases.items() if has_it)
        choices = [" and ".join(sorted(choice)) or "none" for choice in sorted(self.biases, key=len)]
        tests = {
            f"model.mlp is {model.mlp}, it has {self.mlp}": model.mlp != self.mlp,
            f"model.qk_norm is {model.qk_norm}, it has {self.qk_norm}": model.qk_norm != self.qk_norm,
            f"model.alignment is {model.alignment}, it has {self.alignment}": model.alignment != self.alignment,
            "model.sink is true": model.sink,
            "model.softcap is set": model.softcap is not None,
            f"branches are scaled by {model.resid_factor:g} (model.resid_scale)": model.resid_factor != 1.0,
            f"logits are scaled by {model.head_factor:g} (model.head_scale)": model.head_factor != 1.0,
            f"biases are {' and '.join(sorted(found)) or 'none'}, it has {' or '.join(choices)}": (
                found not in self.biases
            ),
        }
        if self.keys:  # LLaDA's, which have neither
            tests["its rotary embeddings are not scaled (model.rope_scaling)"] = model.rope_scaling is not None
            is_other = model.heads * model.head_width != model.hidden
            tests[f"its heads are model.hidden / model.heads wide, not {model.head_width} (model.head_dim)"] = is_other
        return [reason for reason, is_so in tests.items() if is_so]

    def config(
        self, model: ModelConfig, *, vocab_size: int, dtype: str, special: Mapping[str, int | None]
    ) -> dict[str, Any]:
        """Return the whole `config.json` of a model.

        Args:
            model: the model.
            vocab_size: number of rows of the tables.
            dtype: type of the weights.
            special: ids by key, such as `bos_token_id`.
        """
        found = {
            "hidden_size": model.hidden,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.key_heads,
            "intermediate_size": model.mlp_width,
            "max_position_embeddings": model.seq_length,
            "hidden_act": ACTIVATIONS[model.mlp][0],
            "rms_norm_eps": model.norm_eps,
            "rope_theta": model.rope_base,
            "tie_word_embeddings": model.tie_embeddings,
        }
        found = {self.keys.get(key, key): value for key, value in found.items()}
        if not self.keys:
            found |= {
                "head_dim": model.head_width,
                "rope_scaling": _rope_scaling(model),
                "attention_bias": model.qkv_bias,
                "mlp_bias": model.mlp_bias,
            }
        return {
            "architectures": [self.model_class],
            "model_type": self.model_type or next(name for name, kind in ARCHITECTURES.items() if kind is self),
            "torch_dtype": dtype,
            **found,
            **dict.fromkeys(self.vocabulary, vocab_size),
            **self.fixed,
            **self.written,
            **special,
        }


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    """Return the key `rope_scaling` as transformers has it."""
    scaling = model.rope_scaling
    if scaling is None:
        return None
    names = {
        "linear": (),
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    }[scaling.type]
    found = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.original_seq_length is not None:
        found["original_max_position_embeddings"] = scaling.original_seq_length
    return found | {name: getattr(scaling, name) for name in names if getattr(scaling, name) is not None}


_LLAMA = {"attn_layernorm": "input_layernorm", "mlp_layernorm": "post_attention_layernorm"}
_ATTENTION = frozenset({"qkv", "out"})
_NONE: frozenset[str] = frozenset()
_LLADA = {
    "model.layers.": "model.transformer.blocks.",
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "attn_layernorm": "attn_norm",
    "mlp_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
_LLADA_KEYS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "mlp_hidden_size",
    "max_position_embeddings": "max_sequence_length",
    "hidden_act": "activation_type",
    "tie_word_embeddings": "weight_tying",
}
_LLADA_WRITTEN = {"attention_dropout": 0.0, "embedding_dropout": 0.0, "residual_dropout": 0.0}
_LLADA_FIXED = {
    "alibi": False,
    "attention_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "scale_logits": False,
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "LlamaForCausalLM",
        "next_token",
        _LLAMA,
        biases=frozenset({_NONE, _ATTENTION, frozenset({"mlp"}), _ATTENTION | {"mlp"}}),
    ),
    "mistral": Architecture("MistralForCausalLM", "next_token", _LLAMA, written={"sliding_window": None}),
    "qwen2": Architecture(
        "Qwen2ForCausalLM", "next_token", _LLAMA, biases=frozenset({frozenset({"qkv"})}), slides_by_switch=True
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        "next_token",
        _LLAMA,
        qk_norm="head",
        biases=frozenset({_NONE, _ATTENTION}),
        slides_by_switch=True,
    ),
    "arcee": Architecture(
        "ArceeForCausalLM",
        "next_token",
        _LLAMA,
        mlp="relu2",
        biases=frozenset({_NONE, _ATTENTION, frozenset({"mlp"}), _ATTENTION | {"mlp"}}),
    ),
    "llada": Architecture(
        "LLaDAModelLM",
        "gidd",
        _LLADA,
        keys=_LLADA_KEYS,
        fixed=_LLADA_FIXED,
        written=_LLADA_WRITTEN,
        vocabulary=("vocab_size", "embedding_size"),
        needs_own_code=True,
    ),
    "sdar": Architecture("SDARForCausalLM", "gidd", _LLAMA, qk_norm="head", needs_own_code=True),
    "dream": Architecture(
        "DreamModel",
        "gidd",
        _LLAMA,
        model_type="Dream",
        alignment="shifted",
        biases=frozenset({frozenset({"qkv"})}),
        slides_by_switch=True,
        needs_own_code=True,
    ),
}
"""Architectures by their `model_type` in lower case."""


def architecture_for_export(name: str, model: ModelConfig, run: Mapping[str, Any], *, is_causal: bool) -> Architecture:
    """Return an architecture that a model is to be stored in.

    Args:
        name: key of `ARCHITECTURES`.
        model: the model.
        run: the settings of its run. Public diffusion models are of masked noise, and attend to every token.
        is_causal: whether the model predicts next tokens (`Method.export_config`).

    Raises:
        ConfigError: it cannot represent the model, with every reason.
    """
    kind = ARCHITECTURES[name]
    from megadiff.diffusion.config import ConditioningConfig, noise_config  # slow, and the names above need none of it
    from megadiff.diffusion.noise_process import build_process

    reasons, method = kind.reasons_against(model), run["method"]["name"]
    if kind.method == "gidd":
        noise, attention = noise_config(**run["noise"]), ConditioningConfig.model_validate(run["conditioning"])
        if not build_process(noise, vocab_size=2, mask_id=0).is_masked_limit:
            reasons.append("its noise is masked, and the model's is not")
        if attention.trained_prompt_attention != "full":
            reasons.append(f"prompts attend as {attention.trained_prompt_attention}, not as every token")
    if is_causal != (kind.method == "next_token"):
        reasons.insert(0, f"the model was trained with method.name={shown(method).strip(chr(39))}, not {kind.method}")
    if reasons:
        raise ConfigError(
            f"this model cannot be stored as {name}: {'; '.join(reasons)}; leave out --architecture for the layout "
            "that has every option"
        )
    return kind
