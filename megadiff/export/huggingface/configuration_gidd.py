"""Configuration of GIDD models: diffusion language models over masked, uniform and hybrid noise (arXiv:2512.10858)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

_BLOCK = {
    "hidden_act": "relu2",
    "gated_mlp": False,
    "qkv_bias": False,
    "attention_out_bias": False,
    "rotary_scaling": None,
    "alignment": "same",
}
"""Keys of the block that released files lack, and what those files mean."""


class GiddConfig(PretrainedConfig):
    """Architecture of a GIDD model, and the noise it was trained with.

    Every default matches the released `dvruette/gidd-*` checkpoints; keys that they lack are marked as such.

    Args:
        vocab_size: number of ids, mask included.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, head_dim: the sizes; `None` means
            4 * hidden_size and hidden_size / num_attention_heads.
        max_position_embeddings: number of tokens in a training sequence.
        resid_scale: both branches of each of the L blocks are multiplied by resid_scale / L.
        head_scaling: factor on the logits; `None` means 512 / hidden_size.
        weight_scaling: factor on the block's matrices; only 1.0, the value in all released files.
        init_scale, emb_init_scale, head_init_scale: standard deviations of initial weights; `None` for `init_scale`
            means 0.4 / sqrt(hidden_size).
        attn_soft_cap: attention scores s become cap * tanh(s / cap); `None` for no cap.
        rms_norm_eps: added to the mean square in every RMSNorm.
        use_qk_norm: whether queries and keys are normalised.
        qk_norm: (not in released files) `full`: over all heads together; `head`: each head separately; `none`. Takes
            precedence over `use_qk_norm`, which chooses between `full` and `none`.
        num_key_value_heads: (not in released files) heads of keys and values; `None` means num_attention_heads.
        hidden_act: (not in released files) `relu2`, `gelu` or `silu`.
        gated_mlp: (not in released files) whether the MLP's activation gates a further matrix.
        qkv_bias, attention_out_bias: (not in released files) biases of queries, keys and values, and of the matrix
            after attention.
        attention_bias: a learned key and value per head that every query attends to (an attention sink).
        mlp_bias: biases of the MLP's matrices.
        tie_word_embeddings: whether the head is the embedding.
        is_causal: whether attention is causal and logits predict the next token: an autoregressive control.
        rope_theta: base of the rotary frequencies.
        rope_scaling: only `None`.
        rotary_scaling: (not in released files) change of the rotary frequencies: the arguments of
            `rope_gidd.scaled_frequencies`.
        alignment: (not in released files) `same`, or `shifted` if the hidden states of a position predict the token
            after it; logits are in either case those of the token at their own position.
        attn_performer: accepted but ignored; attention is chosen by `attn_soft_cap`.
        noise_type: shift b of the uniform share sigmoid(noise_scale * log_snr + b): -1000 masked, 1000 uniform.
        noise_scale: (not in released files) the share's scale a.
        noise_p_uniform, noise_gamma: (not in released files) parameters of noise in the time form of arXiv:2503.04482;
            when `noise_p_uniform` is given, `noise_type` and `noise_scale` have no meaning.
        noise_table: (not in released files) any other noise: `logit_u`, the log odds of its uniform share, and
            `dlogit_u`, their derivative, at equal steps of log_snr from `min_log_snr` to `max_log_snr`; when it is
            given, the other keys of the noise have no meaning.
        min_log_snr, max_log_snr: noise levels (nats) that were trained.
        prompt_attention: (not in released files) how clean prompt positions attend: `block`, the prompt alone;
            `causal`, what comes before alone; `full`, as every other position.
        prepended_bos: (not in released files) whether the documents of the training data began with bos; the tokenizer
            beside this file puts it before a prompt then, and `generate` without a prompt begins with it. Where it is
            not known, `generate` without a prompt begins with bos.
        mask_token_id: the mask's id.
    """

    model_type = "gidd"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012  as transformers does it

    def __init__(
        self,
        vocab_size: int = 131072,
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        intermediate_size: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 2048,
        resid_scale: float = 4.0,
        head_scaling: float | None = None,
        weight_scaling: float = 1.0,
        init_scale: float | None = None,
        emb_init_scale: float = 0.1,
        head_init_scale: float = 0.0,
        attn_soft_cap: float | None = 30.0,
        rms_norm_eps: float = 1e-6,
        use_qk_norm: bool = True,
        qk_norm: str | None = None,
        attention_bias: bool = True,
        mlp_bias: bool = True,
        is_causal: bool = False,
        rope_theta: float = 10000.0,
        rope_scaling: Any = None,
        attn_performer: str = "eager",
        noise_type: float = 0.0,
        noise_scale: float = 1.0,
        noise_p_uniform: float | None = None,
        noise_gamma: float = 1.0,
        noise_table: dict[str, Any] | None = None,
        min_log_snr: float = -9.0,
        max_log_snr: float = 9.0,
        prompt_attention: str = "block",
        prepended_bos: bool | None = None,
        mask_token_id: int = 3,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.max_position_embeddings = max_position_embeddings
        self.resid_scale = resid_scale
        self.head_scaling = 512 / hidden_size if head_scaling is None else head_scaling
        self.weight_scaling = weight_scaling
        self.init_scale = 0.4 / hidden_size**0.5 if init_scale is None else init_scale
        self.emb_init_scale = emb_init_scale
        self.head_init_scale = head_init_scale
        self.attn_soft_cap = attn_soft_cap
        self.rms_norm_eps = rms_norm_eps
        self.use_qk_norm = use_qk_norm
        self.qk_norm = ("full" if use_qk_norm else "none") if qk_norm is None else qk_norm
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.is_causal = is_causal
        self.rope_theta = rope_theta
        if rope_scaling:  # passing it at all makes transformers 5 warn
            self.rope_scaling = rope_scaling
        self.attn_performer = attn_performer
        self.noise_type = noise_type
        self.noise_scale = noise_scale
        self.noise_p_uniform = noise_p_uniform
        self.noise_gamma = noise_gamma
        if noise_table is not None:  # a folder of other noise need not name it
            self._check_table(noise_table)
        self.noise_table = noise_table
        self.min_log_snr = min_log_snr
        self.max_log_snr = max_log_snr
        self.prompt_attention = prompt_attention
        self.prepended_bos = prepended_bos
        self.mask_token_id = mask_token_id
        block = {"num_key_value_heads": num_attention_heads, **_BLOCK}
        self.__dict__.update({name: kwargs.pop(name, None) or released for name, released in block.items()})
        for name, token in (("bos_token_id", 0), ("eos_token_id", 1), ("pad_token_id", 2)):
            kwargs.setdefault(name, token)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        self._refuse_what_is_not_built(rope_scaling)

    def _check_table(self, table: Any) -> None:
        keys = ("dlogit_u", "logit_u", "max_log_snr", "min_log_snr")
        if not isinstance(table, dict) or sorted(table) != list(keys):
            raise ValueError(f"noise_table must have the keys {', '.join(keys)}, got {table!r:.80}")
        counts = len(table["logit_u"]), len(table["dlogit_u"])
        if counts[0] != counts[1] or counts[0] < 2 or not table["min_log_snr"] < table["max_log_snr"]:
            raise ValueError(
                "noise_table must have two or more numbers in each of logit_u and dlogit_u, equally many, and "
                f"min_log_snr below max_log_snr; got {counts[0]} and {counts[1]} numbers"
            )

    def _refuse_what_is_not_built(self, rope_scaling: Any) -> None:
        rope = rope_scaling or {}
        wrong = {
            "rope_scaling": (rope_scaling, rope.get("rope_type", "default") == "default"),
            "weight_scaling": (self.weight_scaling, self.weight_scaling == 1),
            "hidden_act": (self.hidden_act, self.hidden_act in ("relu2", "gelu", "silu")),
            "qk_norm": (self.qk_norm, self.qk_norm in ("full", "head", "none")),
            "alignment": (self.alignment, self.alignment in ("same", "shifted")),
            "prompt_attention": (self.prompt_attention, self.prompt_attention in ("block", "causal", "full")),
            "head_dim": (self.head_dim, self.head_dim % 2 == 0),
            "num_key_value_heads": (
                self.num_key_value_heads,
                self.num_attention_heads % self.num_key_value_heads == 0,
            ),
        }
        for key, (value, is_fine) in wrong.items():
            if not is_fine:
                raise ValueError(f"this GIDD model has no {key}={value!r}")
