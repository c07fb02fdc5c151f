"""Correspondence of the tensors of a training checkpoint to those of the released layout, with shapes.

A training checkpoint stacks the blocks: `decoder.layers.*` tensors begin with a dimension of L. Queries, keys and
values are one matrix of [heads, 3, head width] rows. Embedding and head have padding rows at their end. The released
layout (`dvruette/gidd-*`) has one tensor per block and matrix, and no padding rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megadiff.model.config import ModelConfig

MODULES_WITH_EXTRA_STATE = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Linear layers for which megatron-core stores an (empty) object of Transformer Engine in every checkpoint."""


@dataclass(frozen=True)
class TrainingTensor:
    """One tensor of a training checkpoint, or one block's part of a stacked one."""

    key: str
    shape: tuple[int, ...]
    """Shape without the dimension of the blocks, padding rows included."""
    released: tuple[str, ...]
    """Names of the corresponding released tensors: q, k and v, or one."""
    layer: int | None = None
    """Index in the stacked tensor."""
    heads: int = 0
    """Number of heads whose rows are interleaved, for three released tensors."""
    rows: int | None = None
    """Number of rows without padding, for a table over the vocabulary."""

    @property
    def offset(self) -> tuple[int, ...]:
        """Offset of its first element in the stored tensor."""
        inner = (0,) * len(self.shape)
        return inner if self.layer is None else (self.layer, *inner)

    @property
    def released_shape(self) -> tuple[int, ...]:
        """Shape of each released tensor."""
        rows = self.shape[0] // len(self.released) if self.rows is None else self.rows
        return (rows, *self.shape[1:])


def training_tensors(model: ModelConfig, *, vocab_size: int) -> Iterator[TrainingTensor]:
    """Yield all tensors of a model, in the order of the released layout.

    Args:
        model: the model's configuration.
        vocab_size: number of real ids, mask included.
    """
    table = (model.padded_vocab_size(vocab_size), model.hidden)
    yield TrainingTensor("embedding.word_embeddings.weight", table, ("model.embed_tokens.weight",), rows=vocab_size)
    for layer in range(model.layers):
        yield from _block(model, layer)
    yield TrainingTensor("decoder.final_layernorm.weight", (model.hidden,), ("model.norm.weight",))
    yield TrainingTensor("output_layer.weight", table, ("lm_head.weight",), rows=vocab_size)


def released_shapes(model: ModelConfig, *, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of the released layout."""
    return {
        name: tensor.released_shape
        for tensor in training_tensors(model, vocab_size=vocab_size)
        for name in tensor.released
    }


def _block(model: ModelConfig, layer: int) -> Iterator[TrainingTensor]:
    hidden, ffn = model.hidden, model.ffn_hidden
    norm_width = {"full": hidden, "head": model.head_dim, "none": 0}[model.qk_norm]
    sink = (model.heads, model.head_dim)
    released = f"model.layers.{layer}."
    attention = [f"{released}self_attn.{name}_proj.weight" for name in "qkv"]

    def plain(key: str, shape: tuple[int, ...], name: str) -> TrainingTensor:
        return TrainingTensor(f"decoder.layers.{key}", shape, (released + name,), layer)

    yield plain("self_attention.linear_qkv.layer_norm_weight", (hidden,), "attn_layernorm.weight")
    yield TrainingTensor(
        "decoder.layers.self_attention.linear_qkv.weight", (3 * hidden, hidden), tuple(attention), layer, model.heads
    )
    yield plain("self_attention.linear_proj.weight", (hidden, hidden), "self_attn.o_proj.weight")
    if norm_width:
        yield plain("self_attention.q_layernorm.weight", (norm_width,), "self_attn.q_norm.weight")
        yield plain("self_attention.k_layernorm.weight", (norm_width,), "self_attn.k_norm.weight")
    if model.sink:
        yield plain("self_attention.core_attention.sink_key", sink, "self_attn.k_bias")
        yield plain("self_attention.core_attention.sink_value", sink, "self_attn.v_bias")
    yield plain("mlp.linear_fc1.layer_norm_weight", (hidden,), "mlp_layernorm.weight")
    yield plain("mlp.linear_fc1.weight", (ffn, hidden), "mlp.up_proj.weight")
    if model.mlp_bias:
        yield plain("mlp.linear_fc1.bias", (ffn,), "mlp.up_proj.bias")
    yield plain("mlp.linear_fc2.weight", (hidden, ffn), "mlp.down_proj.weight")
    if model.mlp_bias:
        yield plain("mlp.linear_fc2.bias", (hidden,), "mlp.down_proj.bias")
