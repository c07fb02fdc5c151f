"""Core attention without a mask: fused where the soft cap is off, honest and chunked where it is on.

Axes: S sequence, B batch, H heads of queries and G of keys and values on this tensor rank, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megadiff.model.cost import SCORE_BYTES


class BidirectionalAttention(MegatronModule):
    """Substitute for megatron-core's `DotProductAttention`, which materialises all scores and needs a mask.

    Without `softcap` it is `scaled_dot_product_attention` (memory linear in S). A `sink` is one more key and value per
    head of queries, learned, neither normalised nor rotated, seen by every query: it is put before the keys, so the
    fused kernel still applies. With fewer heads of keys and values G than of queries H, each serves H / G of them; the
    soft cap and the sink repeat them.

    A sequence whose first P tokens are a clean prompt takes two calls instead of one with an [S, S] mask: the prompt's
    queries over the prompt alone (all of it, or causally), the rest over everything. Causal attention over the whole
    sequence is the case P = S. A sequence of several documents takes a call for each of them.

    Source: arXiv:2512.10858's model; s = D^-1/2 q.k, then softcap * tanh(s / softcap), then softmax.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        *,
        sink: bool = False,
        softcap: float | None = None,
        scale: float = 1.0,
        **_: Any,
    ) -> None:
        """Take megatron-core's arguments of a core attention, and `scale`, a factor on the scores before the cap."""
        super().__init__(config=config)
        assert config.kv_channels is not None
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.softcap = softcap
        self.scale = scale / math.sqrt(config.kv_channels)
        self.queries_per_key = config.num_attention_heads // (config.num_query_groups or config.num_attention_heads)
        self.sink_key = self._sink(heads, config) if sink else None
        self.sink_value = self._sink(heads, config) if sink else None

    def _sink(self, heads: int, config: TransformerConfig) -> torch.nn.Parameter:
        assert config.kv_channels is not None
        parameter = torch.nn.Parameter(torch.zeros(heads, config.kv_channels, dtype=config.params_dtype))
        parameter.tensor_model_parallel = config.tensor_model_parallel_size > 1  # type: ignore[attr-defined]
        parameter.partition_dim = 0  # type: ignore[attr-defined]
        parameter.partition_stride = 1  # type: ignore[attr-defined]
        return parameter

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, /, **_: Any
    ) -> Tensor:
        """Attend.

        Args:
            query: [S, B, H, D].
            key, value: [S, B, G, D].
            attention_mask: None where every token sees every token; else [B] or [B, K] int64 on the CPU (reading it
                must not wait for the device), the codes of a `parallel.attention_pattern.AttentionPattern`.

        Returns:
            [S, B, H * D].
        """
        codes = [] if attention_mask is None else attention_mask.tolist()
        if attention_mask is not None and attention_mask.dim() > 1:
            return self._within_documents(query, key, value, codes)
        is_causal = common_attention(codes, length=query.shape[0])
        if is_causal is not None:
            return self.attend(query, key, value, is_causal=is_causal)
        out = self._with_prompts(*self._heads_first(query, key, value), codes)
        return out.permute(2, 0, 1, 3).flatten(2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
        """Attend with one pattern for all sequences: to every token, or causally; axes as in `forward`."""
        out = self._attend(*self._heads_first(query, key, value), is_causal=is_causal)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _heads_first(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [B, heads, S, D], the sink before keys and values."""
        q, k, v = query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        return q, *self._with_sink(k, v)

    def _with_sink(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, heads, S, D] as `_attend` takes them, repeated if need be, behind the sink."""
        if self.queries_per_key > 1 and (self.sink_key is not None or self.softcap is not None):
            k, v = k.repeat_interleave(self.queries_per_key, 1), v.repeat_interleave(self.queries_per_key, 1)
        if self.sink_key is not None and self.sink_value is not None:
            k, v = _with_sink(k, self.sink_key), _with_sink(v, self.sink_value)
        return k, v

    def _within_documents(self, query: Tensor, key: Tensor, value: Tensor, codes: list[list[int]]) -> Tensor:
        """Attend document by document; axes as in `forward`, and the codes of every sequence's documents."""
        q, k, v = (x.permute(1, 2, 0, 3).split(1) for x in (query, key, value))
        found = []
        for sequence, own in zip(zip(q, k, v, strict=True), codes, strict=True):
            lengths = [abs(code) for code in own if code]
            parts = zip(*(x.split(lengths, dim=2) for x in sequence), strict=True)  # its gradient is one concatenation
            attended = [self._attend(q, *self._with_sink(k, v), is_causal=own[0] < 0) for q, k, v in parts]
            found.append(torch.cat(attended, dim=2))
        return torch.cat(found).permute(2, 0, 1, 3).flatten(2)

    def _with_prompts(self, q: Tensor, k: Tensor, v: Tensor, codes: list[int]) -> Tensor:
        """Attend sequence by sequence, or all at once if every sequence has the same prompt; k and v hold the sink, if
        any."""
        if len(set(codes)) > 1:
            sequences = [(q[i : i + 1], k[i : i + 1], v[i : i + 1], [code]) for i, code in enumerate(codes)]
            return torch.cat([self._with_prompts(*sequence) for sequence in sequences])
        length, is_causal = abs(codes[0]), codes[0] < 0
        if length == 0:
            return self._attend(q, k, v)
        known = length + (k.shape[2] - q.shape[2])  # the sink's place before the prompt's
        prompt = self._attend(q[:, :, :length], k[:, :, :known], v[:, :, :known], is_causal=is_causal)
        if length == q.shape[2]:
            return prompt
        return torch.cat([prompt, self._attend(q[:, :, length:], k, v)], dim=2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
        """[B, H, Q, D] queries over [B, G, K, D] keys; causal means that query i sees keys up to K - Q + i."""
        if self.softcap is not None:
            return capped_attention(q, k, v, scale=self.scale, softcap=self.softcap, is_causal=is_causal)
        extra = k.shape[2] - q.shape[2]
        shares_keys = k.shape[1] != q.shape[1]
        if not is_causal or extra == 0:
            return F.scaled_dot_product_attention(
                q, k, v, scale=self.scale, is_causal=is_causal, enable_gqa=shares_keys
            )
        # The fused causal kernel lines up first queries with first keys: a query for the sink's place, thrown away.
        padded = F.pad(q, (0, 0, extra, 0))
        return F.scaled_dot_product_attention(padded, k, v, scale=self.scale, is_causal=True)[:, :, extra:]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the state, with the sink cut over tensor ranks by heads."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, dict.fromkeys(state, 0), sharded_offsets)


def common_attention(codes: Sequence[int] | Sequence[list[int]], *, length: int) -> bool | None:
    """Return whether attention is causal, if all sequences have the same: full or causal over all tokens.

    Args:
        codes: those of an `AttentionPattern`; empty for full attention.
        length: number of tokens of a sequence.

    Returns:
        None for every other pattern.
    """
    if not any(codes):
        return False
    return True if all(code == -length for code in codes) else None


def _with_sink(x: Tensor, sink: Tensor) -> Tensor:
    """Prepend `sink` [H, D] to `x` [B, H, S, D] as position 0."""
    return torch.cat([sink.to(x.dtype)[None, :, None, :].expand(x.shape[0], -1, -1, -1), x], dim=2)


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float, is_causal: bool = False
) -> Tensor:
    """Compute soft-capped attention, with scores of a chunk of queries at a time, recomputed in the backward pass.

    The product q.k is rounded to q's dtype, as by any matrix product; cap and softmax are in float32.

    Args:
        q: [B, H, Q, D].
        k, v: [B, H, K, D], K >= Q.
        scale: factor on q.k.
        softcap: scores s become softcap * tanh(s / softcap).
        is_causal: query i sees keys up to K - Q + i only.

    Returns:
        [B, H, Q, D] in q's dtype.
    """
    sequences = max(1, SCORE_BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[2]))
    first = k.shape[2] - q.shape[2] if is_causal else None
    if sequences >= q.shape[2]:
        return _capped_chunk(q, k, v, scale, softcap, first)
    chunks = []
    for start in range(0, q.shape[2], sequences):
        part = q[:, :, start : start + sequences]
        seen = None if first is None else first + start
        chunks.append(checkpoint(_capped_chunk, part, k, v, scale, softcap, seen, use_reentrant=False))
    return torch.cat(chunks, dim=2)


def _capped_chunk(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, last_key: int | None) -> Tensor:
    """`last_key` is the last key the chunk's first query sees; None where all see all."""
    scores = q @ k.transpose(-1, -2)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).mul(scale / softcap).tanh() * softcap
    if last_key is not None:
        unseen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(last_key + 1)
        scores = scores.masked_fill(unseen, -torch.inf)
    return scores.softmax(dim=-1).to(v.dtype) @ v
