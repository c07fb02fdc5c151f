"""A Transformer layer that computes what megatron-core's does, without the branches that this package never takes.

megatron-core's layer checks in every call for inference caches, packed sequences, offloading, quantisation, cross
attention and CUDA graphs. In a small model the checks take longer than the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

_ONE_OF_EACH = 3
"""Number of heads that lie together if keys and values have as many heads as queries."""


class Rotation(RotaryEmbedding):
    """Rotary embeddings as the factors that `DirectLayer` takes, computed once for every sequence length."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._factors: dict[int, Tensor] = {}

    def forward(self, max_seq_len: int) -> Tensor:  # type: ignore[override]
        """Return [2, max_seq_len, 1, 1, D] float32: cosines, and sines with the sign that `_rotate` needs."""
        factors = self._factors.get(max_seq_len)
        if factors is None:
            with torch.inference_mode(False), torch.no_grad():
                angles = super().forward(max_seq_len)
                first, second = angles.sin().chunk(2, dim=-1)
                factors = torch.stack((angles.cos(), torch.cat((-first, second), dim=-1)))
            self._factors[max_seq_len] = factors
        return factors


class DirectLayer(TransformerLayer):
    """megatron-core's layer with a forward pass of its own.

    Parts, parameters and checkpoints are the parent's, and so are the results, bit for bit. The positions come from
    `Rotation`. Parts of the layer cannot be recomputed; the whole can.
    """

    rotary_embedding = Rotation
    """Class of the positions that `forward` takes; a layer without this attribute gets megatron-core's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        attention: Any = self.self_attention
        for name in ("q_layernorm", "k_layernorm"):
            if getattr(attention, name) is None:  # megatron-core 0.19, where 0.16 has an identity
                setattr(attention, name, IdentityOp())
        groups, width = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        together = attention.num_attention_heads_per_partition // groups  # queries of one key and value
        self._heads = (groups, together + 2, width)
        self._add_branch: Any = self.mlp_bda(self.training, False)  # type: ignore[operator]

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: None = None,
        context_mask: None = None,
        rotary_pos_emb: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Run the layer.

        Args:
            hidden_states: [sequence, batch, hidden]; with sequence parallelism a part of the sequence.
            attention_mask: the codes of an `AttentionPattern`, as the core attention takes them.
            context, context_mask: None.
            rotary_pos_emb: the factors of `Rotation`.

        Returns:
            (hidden states of the same shape, None), as megatron-core's block takes them.
        """
        assert rotary_pos_emb is not None
        query, key, value = self._before_attention(hidden_states, rotary_pos_emb)
        attended = self.self_attention.core_attention(query, key, value, attention_mask)  # type: ignore[union-attr]
        return self._after_attention(attended, hidden_states), None

    def attend_alike(self, hidden: Tensor, rotation: Tensor, *, is_causal: bool) -> Tensor:
        """Run the layer on sequences that all attend to every token, or all causally; axes as in `forward`."""
        attention: Any = self.self_attention
        projections = self._before_attention(hidden, rotation)
        return self._after_attention(attention.core_attention.attend(*projections, is_causal=is_causal), hidden)

    def _before_attention(self, hidden: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each [sequence, batch, heads, D]."""
        attention: Any = self.self_attention
        mixed, _ = attention.linear_qkv(self.input_layernorm(hidden))  # type: ignore[operator]
        packed = mixed.view(*mixed.shape[:-1], *self._heads)
        if self._heads[1] == _ONE_OF_EACH:
            query, key, value = packed.unbind(-2)
        else:
            query, key, value = packed[..., :-2, :].flatten(-3, -2), packed[..., -2, :], packed[..., -1, :]
        cos, sin = rotation.to(mixed.dtype).unbind(0)
        query = _rotate(attention.q_layernorm(query), cos, sin)
        return query, _rotate(attention.k_layernorm(key), cos, sin), value

    def _after_attention(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Return the residual stream after both branches."""
        attention: Any = self.self_attention
        mlp: Any = self.mlp
        hidden = self._add_branch(attention.linear_proj(attended), residual, 0.0)
        middle, bias = mlp.linear_fc1(self.pre_mlp_layernorm(hidden))  # type: ignore[operator]
        if bias is not None:
            middle = middle + bias
        return self._add_branch(mlp.linear_fc2(mlp.activation_func(middle)), hidden, 0.0)


class CompiledBlock:
    """The layers of megatron-core's block and its last norm, compiled as one graph by `torch.compile`.

    It is made on the first call, separately for full and for causal attention; shapes do not change during training.
    """

    def __init__(self, block: TransformerBlock) -> None:
        self._block = block
        self._run: Any = None

    def __call__(self, hidden: Tensor, rotation: Tensor, *, is_causal: bool) -> Tensor:
        """Run the block on hidden states [sequence, batch, hidden]."""
        if self._run is None:  # the compiler takes seconds to import
            torch.compiler.reset()  # it keeps few graphs of one function, and other models may have had theirs
            options: dict[str, Any] = {"compile_threads": 1}  # worker processes would outlive a stop request
            self._run = torch.compile(_run_layers, dynamic=False, fullgraph=True, options=options)
        return self._run(self._block, hidden, rotation, is_causal=is_causal)


def _run_layers(block: Any, hidden: Tensor, rotation: Tensor, *, is_causal: bool) -> Tensor:
    for layer in block.layers:
        hidden = layer.attend_alike(hidden, rotation, is_causal=is_causal)
    return hidden if block.final_layernorm is None else block.final_layernorm(hidden)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the last dimension as pairs; the first half of `sin` is negative."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
