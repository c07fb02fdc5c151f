"""GIDD: a bidirectional Transformer that predicts clean tokens from noised ones (arXiv:2512.10858).

Pre-norm blocks with scaled residuals; RMSNorm with the gain stored as an offset; queries and keys normalised, then
rotated; soft-capped attention with a learned sink; a squared-ReLU MLP; an untied head. By configuration also fewer
heads of keys than of queries, a gated MLP, biases, and a head that is the embedding. The model's input is tokens alone,
without a noise level. Axes: B sequences, L positions, H heads of queries, G heads of keys and values, D head width, V
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_gidd import GiddConfig
from .generation_gidd import GiddGeneration
from .rope_gidd import attention_factor_of, scaled_frequencies
from .sampling_gidd import Settings  # also because transformers 4 fetches only what this very file imports

__all__ = ["GiddForDiffusionLM", "GiddModel", "Settings"]

_SCORE_BYTES = 256 * 2**20
"""Maximal size of the soft-capped scores computed at a time, in bytes; it limits the number of queries."""

_ACTIVATIONS = {"relu2": lambda x: F.relu(x).square(), "gelu": F.gelu, "silu": F.silu}

Cache = tuple[tuple[Tensor, Tensor], ...]
"""Rotated keys and values [B, G, L, D] of the positions before the input, one pair per block."""


@dataclass
class GiddModelOutput(ModelOutput):
    """Output of the blocks.

    Since transformers 5.24 the cache field has this name, to which it renames the older one in every subclass; there
    `ModelOutput` also has the property below, with a warning.
    """

    last_hidden_state: Tensor | None = None
    """Hidden states after the last norm, [B, L, hidden]."""
    cache: Cache | None = None
    """Keys and values of all positions, if `use_cache` is set."""
    hidden_states: tuple[Tensor, ...] | None = None
    """Hidden states [B, L, hidden] before each block and after the last norm, if `output_hidden_states` is set."""
    attentions: tuple[Tensor, ...] | None = None
    """Always None: attention weights are not stored."""

    @property
    def past_key_values(self) -> Cache | None:
        """The cache under its name in older transformers."""
        return self.cache


@dataclass
class GiddLogits(ModelOutput):
    """Output of the whole model."""

    loss: Tensor | None = None
    """Always None: no loss is computed here."""
    logits: Tensor | None = None
    """Logits, [B, L, V]."""
    cache: Cache | None = None
    """Keys and values of all positions, if `use_cache` is set."""
    hidden_states: tuple[Tensor, ...] | None = None
    """Hidden states [B, L, hidden] before each block and after the last norm, if `output_hidden_states` is set."""
    attentions: tuple[Tensor, ...] | None = None
    """Always None: attention weights are not stored."""

    @property
    def past_key_values(self) -> Cache | None:
        """The cache under its name in older transformers."""
        return self.cache


class GiddRMSNorm(nn.Module):
    """RMSNorm x / rms(x) * (1 + weight) over the last dimension, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input, of the same shape and dtype."""
        return F.rms_norm(x.float(), x.shape[-1:], 1.0 + self.weight.float(), self.eps).type_as(x)


class GiddMLP(nn.Module):
    """MLP down(relu(up(x))^2), with another activation a down(a(up(x))), gated down(a(gate(x)) * up(x))."""

    def __init__(self, config: GiddConfig) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.is_gated = config.gated_mlp
        if self.is_gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, L, hidden] to the same shape."""
        if self.is_gated:
            return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.activation(self.up_proj(x)))


class GiddAttention(nn.Module):
    """Attention to every allowed position, and always to the sink."""

    def __init__(self, config: GiddConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.heads, self.soft_cap, self.qk_norm = config.num_attention_heads, config.attn_soft_cap, config.qk_norm
        factor = attention_factor_of(**config.rotary_scaling) if config.rotary_scaling else 1.0
        self.scale = factor**2 * self.head_dim**-0.5
        self.queries_per_key = self.heads // config.num_key_value_heads
        queries, keys = self.heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, hidden, bias=config.attention_out_bias)
        if config.qk_norm != "none":
            is_full = config.qk_norm == "full"
            self.q_norm = GiddRMSNorm(queries if is_full else self.head_dim, config.rms_norm_eps)
            self.k_norm = GiddRMSNorm(keys if is_full else self.head_dim, config.rms_norm_eps)
        self.has_sink = config.attention_bias
        if self.has_sink:
            self.k_bias = nn.Parameter(torch.zeros(self.heads, self.head_dim))
            self.v_bias = nn.Parameter(torch.zeros(self.heads, self.head_dim))

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], allowed: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Map [B, L, hidden] to the same shape; also return the keys and values of all positions, without the sink."""
        q = _rotated(self._heads(self.q_proj(x), "q_norm"), rope)
        k = _rotated(self._heads(self.k_proj(x), "k_norm"), rope)
        v = self._heads(self.v_proj(x))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        seen = (k, v)
        if self.queries_per_key > 1:
            k, v = k.repeat_interleave(self.queries_per_key, 1), v.repeat_interleave(self.queries_per_key, 1)
        if self.has_sink:
            k, v = _with_sink(k, self.k_bias), _with_sink(v, self.v_bias)
            allowed = None if allowed is None else F.pad(allowed, (1, 0), value=True)
        out = self._attend(q, k, v, allowed)
        return self.o_proj(out.transpose(1, 2).flatten(2)), seen

    def _heads(self, x: Tensor, norm: str = "") -> Tensor:
        """Reshape [B, L, heads * D] to [B, heads, L, D], normalised over all heads or each head."""
        if norm and self.qk_norm == "full":
            x = getattr(self, norm)(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        if norm and self.qk_norm == "head":
            x = getattr(self, norm)(x)
        return x.transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        if self.soft_cap is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=self.scale)
        sequences = max(1, _SCORE_BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[2]))
        starts = range(0, q.shape[2], sequences)
        parts = [
            (q[:, :, i : i + sequences], None if allowed is None else allowed[:, :, i : i + sequences]) for i in starts
        ]
        return torch.cat([self._capped(part, k, v, may_see, self.soft_cap) for part, may_see in parts], dim=2)

    def _capped(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, cap: float) -> Tensor:
        """Compute soft-capped attention; the scores are in float32 after the product."""
        scores = (q @ k.transpose(-1, -2)).float()
        scores = scores.mul(self.scale / cap).tanh() * cap
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1).to(v.dtype) @ v


class GiddBlock(nn.Module):
    """Block h += r attention(norm(h)); h += r mlp(norm(h)), with r = resid_scale / number of blocks."""

    def __init__(self, config: GiddConfig) -> None:
        super().__init__()
        self.factor = config.resid_scale / config.num_hidden_layers
        self.attn_layernorm = GiddRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GiddAttention(config)
        self.mlp_layernorm = GiddRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GiddMLP(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], allowed: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Map [B, L, hidden] to the same shape, and return the keys and values."""
        branch, seen = self.self_attn(self.attn_layernorm(x), rope, allowed, past)
        x = torch.add(x, branch, alpha=self.factor)
        return torch.add(x, self.mlp(self.mlp_layernorm(x)), alpha=self.factor), seen


class GiddPreTrainedModel(PreTrainedModel):
    """Initial weights, and the attributes that transformers expects."""

    config_class = GiddConfig
    base_model_prefix = "model"
    _no_split_modules = ["GiddBlock"]  # noqa: RUF012  as transformers does it
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise parameters that a file did not give: normal matrices, zero gains, biases and sinks."""
        head = getattr(self, "lm_head", None)
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            std = 0.0
            if isinstance(module, nn.Embedding):
                std = self.config.emb_init_scale
            elif isinstance(module, nn.Linear) and name == "weight":
                std = self.config.head_init_scale if module is head else self.config.init_scale
            with torch.no_grad():
                parameter.normal_(0.0, std) if std > 0 else parameter.zero_()


class GiddModel(GiddPreTrainedModel):
    """Model from token ids to hidden states."""

    _keys_to_ignore_on_load_unexpected = [r"lm_head\..*"]  # noqa: RUF012  as transformers does it

    def __init__(self, config: GiddConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GiddBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = GiddRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        prompt_lengths: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> GiddModelOutput | tuple[Any, ...]:
        """Run the blocks.

        Args:
            input_ids: [B, L].
            attention_mask: None for full attention; [B, K], 1 where a key is visible (K counts cached ones); or boolean
                [B, L, K] or [B, 1, L, K], True where that query may attend to that key. The sink is always visible.
            position_ids: [L] or [B, L]; by default they continue after the cached ones.
            inputs_embeds: [B, L, hidden] instead of `input_ids`.
            cache: see `Cache`.
            past_key_values: the cache under its name in older transformers.
            use_cache: return keys and values of all positions, the cached ones first.
            prompt_lengths: [B] leading tokens that are clean and attend according to `config.prompt_attention`.
            output_hidden_states: also return the hidden states of every block; by default as configured.
            output_attentions: only False.
            return_dict: False for a tuple of the values that are not None, instead of a named output.

        Raises:
            ValueError: neither or both of ids and embeddings are given, or attention weights are requested.
        """
        if output_attentions:
            raise ValueError(
                "output_attentions=True is not supported: attention weights are computed in parts and not stored"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = past_key_values if cache is None else cache
        known = 0 if past is None else past[0][0].shape[2]
        if position_ids is None:
            position_ids = torch.arange(known, known + x.shape[1], device=x.device)
        rope = self._rope(position_ids, x.dtype)
        allowed = self._allowed(x, known, attention_mask, prompt_lengths)
        seen, states = [], []
        for index, layer in enumerate(self.layers):
            states += [x] if output_hidden_states else []
            x, keys_and_values = layer(x, rope, allowed, None if past is None else past[index])
            seen.append(keys_and_values if use_cache else None)
        x = self.norm(x)
        out = GiddModelOutput(
            last_hidden_state=x,
            cache=tuple(seen) if use_cache else None,  # type: ignore[arg-type]
            hidden_states=(*states, x) if output_hidden_states else None,
        )
        return _named(out, return_dict, self.config)

    def _rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, [1 or B, 1, L, D]; computed on the fly, so there is no buffer to lose."""
        width = self.config.head_dim
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
        frequencies = 1.0 / self.config.rope_theta**exponents
        if self.config.rotary_scaling:
            frequencies = scaled_frequencies(frequencies, self.config.rope_theta, **self.config.rotary_scaling)
        angles = positions.float().unsqueeze(-1) * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        angles = angles.view(-1, 1, *angles.shape[-2:])
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _allowed(self, x: Tensor, known: int, mask: Tensor | None, prompts: Tensor | None) -> Tensor | None:
        """Return a boolean mask of the keys that each query may attend to, [1 or B, 1, L, known + L]; None for all."""
        queries = torch.arange(known, known + x.shape[1], device=x.device)
        keys = torch.arange(known + x.shape[1], device=x.device)
        parts = []
        if mask is not None:
            if mask.is_floating_point() and mask.ndim > 2:
                raise ValueError("attention_mask [B, L, K] must be boolean, True where a query may see a key")
            parts.append({2: mask[:, None, None], 3: mask[:, None]}.get(mask.ndim, mask).bool())
        if self.config.is_causal:
            parts.append((keys <= queries[:, None])[None, None])
        elif prompts is not None and self.config.prompt_attention != "full":
            length = prompts.to(x.device)[:, None, None, None]
            last = queries[:, None] if self.config.prompt_attention == "causal" else length - 1
            parts.append((queries[:, None] >= length) | (keys <= last))
        allowed = None
        for part in parts:
            allowed = part if allowed is None else allowed & part
        return None if allowed is None else allowed.expand(-1, -1, len(queries), len(keys))


class GiddForDiffusionLM(GiddPreTrainedModel, GiddGeneration, GenerationMixin):
    """Model from token ids to logits over clean tokens, with `generate`. The mask's own logit is meaningless."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  if the configuration ties them

    def __init__(self, config: GiddConfig) -> None:
        super().__init__(config)
        self.model = GiddModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        hidden_before: Tensor | None = None,
        **kwargs: Any,
    ) -> GiddLogits | tuple[Any, ...]:
        """Compute logits [B, L, V] from `GiddModel.forward`'s arguments; `loss` is None.

        Args:
            input_ids: [B, L].
            labels: only None.
            return_dict: as in `GiddModel.forward`.
            hidden_before: [B, 1, hidden] last hidden states of the position before the input, which predict its first
                token if `config.alignment` is `shifted`; without them the first position predicts itself.
            **kwargs: arguments of `GiddModel.forward`.

        Raises:
            ValueError: labels are given; the diffusion bound needs the noise levels, which a batch does not contain.
        """
        if labels is not None:
            raise ValueError("no loss is computed here: the bound needs each token's noise level; train with megadiff")
        out = self.model(input_ids, return_dict=True, **kwargs)
        hidden = out.last_hidden_state
        if self.config.alignment == "shifted":
            hidden = torch.cat([hidden[:, :1] if hidden_before is None else hidden_before, hidden[:, :-1]], dim=1)
        if self.config.head_scaling != 1.0:
            hidden = hidden * self.config.head_scaling
        logits = GiddLogits(logits=self.lm_head(hidden), cache=out.cache, hidden_states=out.hidden_states)
        return _named(logits, return_dict, self.config)


def _named(out: Any, return_dict: bool | None, config: Any) -> Any:
    """Return the output itself, or a tuple of its values if requested."""
    wants_names = getattr(config, "return_dict", True) if return_dict is None else return_dict
    return out if wants_names else out.to_tuple()


def _rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary embedding to [B, H, L, D], halves paired."""
    low, high = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat([-high, low], dim=-1) * rope[1]


def _with_sink(x: Tensor, sink: Tensor) -> Tensor:
    """Prepend `sink` [H, D] to `x` [B, H, K, D]."""
    return torch.cat([sink.to(x.dtype)[None, :, None].expand(x.shape[0], -1, -1, -1), x], dim=2)
