"""Core attention without a mask: fused where the soft cap is off, honest and chunked where it is on.

Axes: S sequence, B batch, H heads of this tensor rank, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_SCORE_BYTES = 256 * 2**20
"""Scores of one query chunk of the soft-capped path stay below this many bytes."""


class BidirectionalAttention(MegatronModule):
    """Stands in for megatron-core's `DotProductAttention`, which materialises all scores and asks for a mask.

    Without `softcap` it is one call of `scaled_dot_product_attention` (memory linear in S). A `sink` is one more key
    and value per head, learned, neither normalised nor rotated, seen by every query: it is concatenated to the keys,
    so the fused kernel still applies.

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
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.softcap = softcap
        self.scale = 1.0 / math.sqrt(config.kv_channels)
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
        """`query`, `key`, `value` [S, B, H, D] to [S, B, H * D]; the mask must be None."""
        assert attention_mask is None, "bidirectional attention takes no mask"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.sink_key is not None and self.sink_value is not None:
            k, v = _with_sink(k, self.sink_key), _with_sink(v, self.sink_value)
        if self.softcap is None:
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            out = capped_attention(q, k, v, scale=self.scale, softcap=self.softcap)
        return out.permute(2, 0, 1, 3).flatten(2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The sink is cut over tensor ranks by heads."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, dict.fromkeys(state, 0), sharded_offsets)


def _with_sink(x: Tensor, sink: Tensor) -> Tensor:
    """Prepend `sink` [H, D] to `x` [B, H, S, D] as position 0."""
    return torch.cat([sink.to(x.dtype)[None, :, None, :].expand(x.shape[0], -1, -1, -1), x], dim=2)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float) -> Tensor:
    """Soft-capped attention with scores in float32, formed for a chunk of queries at a time and recomputed backward.

    Args:
        q: [B, H, S, D].
        k, v: [B, H, K, D].
        scale: factor on q.k.
        softcap: scores s become softcap * tanh(s / softcap).

    Returns:
        [B, H, S, D] in q's dtype.
    """
    rows = max(1, _SCORE_BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[2]))
    if rows >= q.shape[2]:
        return _capped_chunk(q, k, v, scale, softcap)
    chunks = [checkpoint(_capped_chunk, part, k, v, scale, softcap, use_reentrant=False) for part in q.split(rows, 2)]
    return torch.cat(chunks, dim=2)  # type: ignore[arg-type]


def _capped_chunk(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).float().mul(scale / softcap).tanh() * softcap
    return scores.softmax(dim=-1).to(v.dtype) @ v
