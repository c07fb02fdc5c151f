"""The cost of a model in closed form: parameters, training FLOPs per token, bytes per rank. No torch.

Symbols: L layers, d hidden width, f MLP multiple, V vocabulary entries with the mask, S tokens per sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from megadiff import loss
from megadiff.errors import ConfigError
from megadiff.scaling import flops
from megadiff.scaling.flops import FlopCount

QkNorm = Literal["full", "head", "none"]
Mlp = Literal["relu2", "gelu", "swiglu", "geglu"]
Fp8 = Literal["none", "delayed", "tensorwise", "blockwise"]

GATED: tuple[Mlp, ...] = ("swiglu", "geglu")
"""Kinds of MLP with a gate beside the first matrix."""

SCORE_BYTES = 256 * 2**20
"""Capped attention scores of one chunk of queries stay below this many bytes in float32 (`model.attention`)."""


@dataclass(frozen=True)
class Shape:
    """A denoiser's size. The paper's models are `qk_norm="full", sink=True, mlp_bias=True` (arXiv:2512.10858)."""

    layers: int
    hidden: int
    heads: int
    vocab_size: int
    seq_length: int
    ffn_multiple: float = 4
    qk_norm: QkNorm = "head"
    sink: bool = False
    mlp_bias: bool = False
    softcap: bool = False
    """Whether attention scores are capped, and so formed as arrays."""
    kv_heads: int | None = None
    """Heads of keys and values; None for as many as of queries."""
    head_dim: int | None = None
    """Features of one attention head; None for hidden / heads."""
    ffn_hidden: int | None = None
    """Width of the MLP's middle; None for hidden * ffn_multiple."""
    mlp: Mlp = "relu2"
    qkv_bias: bool = False
    attention_out_bias: bool = False
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.head_dim is None and self.hidden % self.heads:
            raise ConfigError(f"hidden {self.hidden} must be a multiple of heads {self.heads}")

    @property
    def head_width(self) -> int:
        """Features of one attention head."""
        return self.hidden // self.heads if self.head_dim is None else self.head_dim

    @property
    def query_width(self) -> int:
        """Features of all heads of queries."""
        return self.heads * self.head_width

    @property
    def key_width(self) -> int:
        """Features of all heads of keys, and of all heads of values."""
        return (self.kv_heads or self.heads) * self.head_width

    @property
    def mlp_width(self) -> int:
        """Width of the MLP's middle."""
        return int(self.hidden * self.ffn_multiple) if self.ffn_hidden is None else self.ffn_hidden

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has a gate beside its first matrix."""
        return self.mlp in GATED

    @property
    def layer_matrices(self) -> int:
        """Entries of the matrices of one layer."""
        attention = 2 * self.query_width + 2 * self.key_width
        return self.hidden * (attention + (2 + self.is_gated) * self.mlp_width)

    @property
    def cut_biases(self) -> int:
        """Biases of one layer that tensor ranks share: those of queries, keys and values and of the MLP's middle."""
        projections = (self.query_width + 2 * self.key_width) * self.qkv_bias
        return projections + (1 + self.is_gated) * self.mlp_width * self.mlp_bias

    @property
    def whole_biases(self) -> int:
        """Biases of one layer that every tensor rank holds: those on the residual stream."""
        return self.hidden * (self.mlp_bias + self.attention_out_bias)


@dataclass(frozen=True)
class Parameters:
    """Parameters by role, over the whole model."""

    embedding: int
    head: int
    hidden_matrices: int
    """The matrices of the layers: q, k, v, o, gate, up, down."""
    norms: int
    """Gains: two a layer and the final one, and those of q and k."""
    biases: int
    sink: int
    """The learned extra key and value of every layer."""

    @property
    def non_embedding(self) -> int:
        """All but the embedding and the output head."""
        return self.hidden_matrices + self.norms + self.biases + self.sink

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))


def padded_vocab_size(vocab_size: int, *, multiple: int = 128) -> int:
    """Return the number of entries of the embedding and the head, padding included; the same on every layout."""
    return -(-vocab_size // multiple) * multiple


def parameters(shape: Shape, *, vocab_entries: int | None = None) -> Parameters:
    """Return the parameters by role; `vocab_entries` counts padding too (default: the true vocabulary)."""
    d, entries = shape.hidden, vocab_entries if vocab_entries is not None else shape.vocab_size
    gains = {"full": shape.query_width + shape.key_width, "head": 2 * shape.head_width, "none": 0}[shape.qk_norm]
    return Parameters(
        embedding=entries * d,
        head=0 if shape.tie_embeddings else entries * d,
        hidden_matrices=shape.layers * shape.layer_matrices,
        norms=shape.layers * (2 * d + gains) + d,
        biases=shape.layers * (shape.cut_biases + shape.whole_biases),
        sink=shape.layers * 2 * shape.query_width if shape.sink else 0,
    )


def paper_parameters(shape: Shape) -> int:
    """Return the non-embedding parameters as the paper's notebooks count them: biases twice, sinks not at all."""
    counted = parameters(shape)
    return counted.hidden_matrices + counted.norms + 2 * counted.biases


def flops_per_token(shape: Shape, count: FlopCount) -> float:
    """Return the training FLOPs of a token by one of the counts of `megadiff.scaling.flops`."""
    return flops.flops_per_token(
        shape.layers,
        shape.hidden,
        shape.seq_length,
        method=count,
        vocab_size=shape.vocab_size,
        params=paper_parameters(shape),
        attention_width=shape.query_width,
    )


def matrix_flops_per_token(shape: Shape) -> float:
    """Return the FLOPs of a token's matrix products, 6 (E + V d) + 12 L d S with E entries of the layers' matrices.

    Utilisation (MFU) is measured by it: the count `full` without norms and biases, which no matrix product computes
    and which are a thousandth of it at width 1024. Recomputation, the softmax and the embedding look-up are not
    counted, as usual for model FLOPs. What a step really computed is `executed_flops`.
    """
    return flops.flops_per_token(
        shape.layers,
        shape.hidden,
        shape.seq_length,
        method="full",
        vocab_size=shape.vocab_size,
        params=parameters(shape).hidden_matrices,
        attention_width=shape.query_width,
    )


def executed_flops(
    shape: Shape,
    *,
    tokens: float,
    head_tokens: float,
    pairs: float,
    vocab_entries: int,
    recompute_layers: int = 0,
    recompute_modules: tuple[str, ...] = (),
) -> float:
    """Return the FLOPs of the matrix products that a step computed, forward and backward, over all ranks.

    Unlike model FLOPs this counts the head only at the tokens whose logits are computed (under masked noise the masks),
    padded vocabulary entries, attention only over the pairs that are scored, and recomputed parts once more. What an
    attention kernel computes again inside itself is not counted.

    Args:
        tokens: tokens that passed the layers.
        head_tokens: tokens whose logits were computed.
        pairs: (query, key) pairs that were scored in one layer, a sink's left out.
        vocab_entries: columns of the logits, padding included.
        recompute_layers: layers of the whole model that are recomputed in full.
        recompute_modules: what is recomputed in every layer (`Layout.recompute_modules`).
    """
    d, matrices = shape.hidden, shape.layer_matrices
    scores = 4.0 * shape.query_width * (pairs + tokens * shape.sink)  # forward, one layer: q k^T and the sum of values
    layer = 2.0 * matrices * tokens + scores
    again = recompute_layers * layer
    if "mlp" in recompute_modules:
        again += shape.layers * 2.0 * (2 + shape.is_gated) * d * shape.mlp_width * tokens
    if "core_attn" in recompute_modules:
        again += shape.layers * scores
    return 3.0 * shape.layers * layer + 6.0 * vocab_entries * d * head_tokens + again


@dataclass(frozen=True)
class Layout:
    """Split of a run over ranks, as far as memory goes."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    data: int = 1
    num_microbatches: int | None = None
    """Number of microbatches of a step; None for as many as fill the pipeline."""
    sequence: bool = False
    """Sequence parallelism: the residual stream is split over the tensor group too."""
    micro_batch_size: int = 1
    distributed_optimizer: bool = False
    recompute_layers: int = 0
    """Number of layers of each chunk whose input alone is kept, under full recomputation."""
    recompute_modules: tuple[str, ...] = ()
    """Selective recomputation: `mlp`, `layernorm`, `core_attn`; scores are counted only where they are capped."""
    fused_loss: bool = False
    """The logits of a microbatch never exist as a whole (`loss.fused_lm_head`)."""
    fused_layers: bool = False
    """Whether the layers are Transformer Engine's; otherwise they are megatron-core's own on torch kernels."""

    def in_flight(self, stage: int) -> float:
        """Return the number of microbatches whose activations a pipeline stage holds at once, counted over its chunks.

        A stage starts its first backward pass after a warm-up of p - 1 - stage microbatches, or, with v > 1 chunks, of
        2 (p - 1 - stage) + (v - 1) p chunks of microbatches (`get_pp_rank_microbatches` of megatron-core), and holds
        the one that it then runs forward too. No more exist than the step has.
        """
        later = self.pipeline - 1 - stage
        held = float(later + 1)
        if self.virtual_pipeline > 1:
            held = self.pipeline + (later - stage) / self.virtual_pipeline
        return held if self.num_microbatches is None else min(held, self.num_microbatches)


@dataclass(frozen=True)
class Precision:
    """Bytes an element takes."""

    params: Literal["bf16", "fp32"] = "fp32"
    compute: Literal["bf16", "fp32"] = "fp32"
    master_weights: bool = False
    """A further fp32 copy of bf16 parameters, in the optimizer."""
    fp32_gradients: bool = True
    moments: int = 2
    """Number of fp32 values that the optimizer keeps for each parameter beside the master copy."""
    role_moments: Mapping[str, int] = field(default_factory=dict)
    """Number for the parameters of a role (`hidden`, `embedding`, `head`, `norm`, `bias`) that has another one."""
    fp8: Fp8 = "none"
    """Recipe by which the layers compute in FP8; their matrices are then also held as FP8, once each way they are
    multiplied, from a step's first microbatch on."""
    bf16_ends: int = 0
    """Number of layers at either end of the model that compute in bf16 all the same."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds, by what they are for."""

    parameters: int
    gradients: int
    optimizer: int
    activations_per_microbatch: int
    activations: int
    """Bytes of all microbatches that are in flight at once (`Layout.in_flight`)."""
    logits: int

    @property
    def total(self) -> int:
        """All of it; a single microbatch is already part of `activations`."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits


def bytes_per_rank(shape: Shape, layout: Layout, precision: Precision, *, vocab_entries: int | None = None) -> Memory:
    """Return the estimated bytes on the fullest pipeline stage's ranks.

    The distributed optimizer splits the optimizer's moments and the master copy over the data and context ranks. Not
    counted: the CUDA context, collective buffers, workspaces, fragmentation, and the working set of the layer that is
    being recomputed.
    """
    stages = (
        stage_memory(shape, layout, precision, stage=stage, vocab_entries=vocab_entries)
        for stage in range(layout.pipeline)
    )
    return max(stages, key=lambda memory: memory.total)


def stage_memory(
    shape: Shape, layout: Layout, precision: Precision, *, stage: int, vocab_entries: int | None = None
) -> Memory:
    """Return the estimated bytes on one pipeline stage's ranks; see `bytes_per_rank`."""
    sequences = vocab_entries if vocab_entries is not None else padded_vocab_size(shape.vocab_size)
    first, last = stage == 0, stage == layout.pipeline - 1
    layers = -(-shape.layers // layout.pipeline)
    table = sequences * shape.hidden // layout.tensor
    by_role = {role: layers * count for role, count in _layer_parameters(shape, layout.tensor).items()}
    by_role["norm"] += last * shape.hidden
    by_role["embedding"] = (first or (last and shape.tie_embeddings)) * table
    by_role["head"] = (last and not shape.tie_embeddings) * table
    held = sum(by_role.values())
    replicas = layout.data * layout.context if layout.distributed_optimizer else 1
    moments = sum(count * precision.role_moments.get(role, precision.moments) for role, count in by_role.items())
    state_bytes = 4 * moments + 4 * held * (precision.master_weights and precision.params == "bf16")
    tokens = layout.micro_batch_size * shape.seq_length // layout.context
    inputs_only = layout.recompute_layers * layout.virtual_pipeline
    in_fp8 = _fp8_layers(shape, layout, precision, stage=stage, after=layout.recompute_layers)
    per_token = in_fp8 * _layer_bytes(shape, layout, precision)
    per_token += (layers - inputs_only - in_fp8) * _layer_bytes(shape, layout, replace(precision, fp8="none"))
    per_token += inputs_only * _stream(shape, layout) * _size(precision.compute)
    if inputs_only or layout.fused_layers:
        # An input of all fused or recomputed layers of a chunk: angles, or their cosines and sines.
        rotation = (1 if layout.fused_layers else 2) * 4 * shape.head_width
        per_token += rotation * layout.virtual_pipeline / layout.micro_batch_size
    per_token += last * _final_norm_bytes(shape, layout, precision)
    kept = tokens * per_token
    fp8_copies = 2 * _fp8_layers(shape, layout, precision, stage=stage) * shape.layer_matrices // layout.tensor
    return Memory(
        parameters=held * _size(precision.params) + fp8_copies,
        gradients=held * (4 if precision.fp32_gradients else _size(precision.params)),
        optimizer=-(-state_bytes // replicas),
        activations_per_microbatch=round(kept),
        activations=round(kept * layout.in_flight(stage)),
        logits=_head(layout, precision, tokens, sequences // layout.tensor, shape.hidden) if last else 0,
    )


def _fp8_layers(shape: Shape, layout: Layout, precision: Precision, *, stage: int, after: int = 0) -> int:
    """Return the number of a stage's layers that compute in FP8, the first `after` of each chunk left out."""
    if precision.fp8 == "none":
        return 0
    chunk = -(-shape.layers // (layout.pipeline * layout.virtual_pipeline))
    first = [(index * layout.pipeline + stage) * chunk for index in range(layout.virtual_pipeline)]
    numbers = [number for start in first for number in range(start + after, start + chunk)]
    return sum(precision.bf16_ends <= number < shape.layers - precision.bf16_ends for number in numbers)


def _head(layout: Layout, precision: Precision, tokens: int, columns: int, hidden: int) -> int:
    """Return the bytes of a microbatch's logits and of the tensors made from them."""
    size, elements = _size(precision.compute), tokens * columns
    if layout.fused_loss:  # a chunk of them, and the head's gradient until it joins the others
        return min(elements, loss.CHUNK_LOGITS[precision.compute]) * size + 4 * columns * hidden
    return elements * (size + 8)  # in compute precision, once more as float32, and their float32 gradient


def _layer_parameters(shape: Shape, tensor: int) -> dict[str, int]:
    """Return the parameters of one layer on one rank by role.

    Norm gains and the biases on the residual stream are whole on every rank; sinks count as biases.
    """
    gains = (shape.query_width + shape.key_width) * (shape.qk_norm == "full")
    whole_gains = 2 * shape.hidden + 2 * shape.head_width * (shape.qk_norm == "head")
    return {
        "hidden": shape.layer_matrices // tensor,
        "norm": gains // tensor + whole_gains,
        "bias": (shape.cut_biases + 2 * shape.query_width * shape.sink) // tensor + shape.whole_biases,
    }


def _layer_bytes(shape: Shape, layout: Layout, precision: Precision) -> float:
    """Return the bytes that one layer keeps for its backward pass, per token.

    The parts are those that autograd was seen to save in real builds on the CPU (`tests/model/test_saved_tensors.py`);
    for Transformer Engine's layers, those that its own autograd functions save on the meta device
    (`tests/run/test_engine_dry_run.py`). Compare Korthikanti et al., arXiv:2205.05198, section 4, which counts fused
    layers without dropout.
    """
    stream, cut = _stream(shape, layout), layout.tensor
    norm = stream * _branch_norm_bytes(layout, precision) + 4 * stream / shape.hidden  # with 1 / rms in float32
    is_recomputed = layout.fused_layers and "mlp" in layout.recompute_modules  # the norm is part of the first matrix
    branches = norm + (stream * _size(precision.compute) if is_recomputed else norm)
    return branches + (_attention_bytes(shape, layout, precision) + _mlp_bytes(shape, layout, precision)) / cut


def _operand_bytes(precision: Precision) -> float:
    """Return the bytes of an element of what a matrix of Transformer Engine's reads, as kept for its gradient.

    By blocks there is a float32 scale for every 128 elements.
    """
    return {"none": _size(precision.compute), "delayed": 1, "tensorwise": 1, "blockwise": 1 + 4 / 128}[precision.fp8]


def _branch_norm_bytes(layout: Layout, precision: Precision) -> float:
    """Return the bytes per feature of the norm before a branch: its input and what the matrix behind it reads.

    The local norm keeps its input and the normalised input in float32; recomputed, it keeps its input alone.
    """
    size = _size(precision.compute)
    if layout.fused_layers:
        return size + _operand_bytes(precision)
    return size if "layernorm" in layout.recompute_modules else 8 + size


def _attention_bytes(shape: Shape, layout: Layout, precision: Precision) -> float:
    """Return the bytes per token of attention between its matrices, over all heads.

    Queries, keys and values are views of one array, which is kept whole as soon as one of them is. A sink copies keys
    and values, and with fewer heads of them than of queries, sink and soft cap repeat them. The tables of the rotary
    embedding are made in each layer, for queries and keys apart.
    """
    queries, keys, size = shape.query_width, shape.key_width, _size(precision.compute)
    is_fused, is_bf16 = layout.fused_layers, precision.compute == "bf16"
    is_grouped = keys != queries
    copies = (shape.sink or (is_grouped and shape.softcap)) and "core_attn" not in layout.recompute_modules
    reads_views = shape.qk_norm == "head" and not is_fused and not is_bf16  # float32 needs no copy to normalise
    packed = (queries + 2 * keys) * size if not copies or reads_views else 0
    seen = queries if copies else keys  # of keys, and of values if they are not views of the common array
    rotated, values = (queries + seen) * size, seen * size if copies else 0
    norm = {"none": 0, "head": 4 + 4 * is_bf16, "full": 8}[shape.qk_norm] * (queries + keys)
    if is_fused and shape.qk_norm == "head":
        norm = size * (queries + keys)
    if reads_views and is_grouped and keys > shape.head_width * layout.tensor:  # queries that lie apart are copied
        norm += queries * size
    small = 4.0 * shape.heads  # the log of each softmax's sum
    out = queries * size
    if is_fused:
        is_kept = not shape.softcap and "core_attn" not in layout.recompute_modules  # by attention itself
        is_quantised = precision.fp8 == "delayed"  # with the other recipes the matrix keeps its input as it is
        out = queries * (size * (is_kept or not is_quantised) + is_quantised)
        small *= is_kept
    heads = shape.heads + (shape.kv_heads or shape.heads)
    small += {"none": 0, "head": 4 * heads, "full": 8 * layout.tensor}[shape.qk_norm]
    small += 0 if is_fused else 4.0 * shape.head_width * size * layout.tensor / layout.micro_batch_size
    return packed + rotated + values + norm + out + small + _score_bytes(shape, layout, precision)


def _score_bytes(shape: Shape, layout: Layout, precision: Precision) -> float:
    """Return the bytes per token of capped scores, over all heads: tanh, softmax, and the softmax in bf16.

    Where they are too many for one chunk they are recomputed chunk by chunk and not kept.
    """
    if not shape.softcap or "core_attn" in layout.recompute_modules:
        return 0.0
    keys = shape.seq_length + shape.sink
    whole = 4 * layout.micro_batch_size * shape.heads // layout.tensor * keys * shape.seq_length
    if whole > SCORE_BYTES:
        return 0.0
    return shape.heads * keys * (8.0 + (2 if precision.compute == "bf16" else 0))


def _mlp_bytes(shape: Shape, layout: Layout, precision: Precision) -> float:
    """Return the bytes per token of the MLP between its matrices, and of what the last one reads.

    Without a gate that is an input of the activation, relu or gelu; with one, gate, value and activated gate.
    """
    if "mlp" in layout.recompute_modules:
        return 0.0
    size = _size(precision.compute)
    middle = (3 if shape.is_gated else 1) * size
    return shape.mlp_width * (middle + (_operand_bytes(precision) if layout.fused_layers else size))


def _final_norm_bytes(shape: Shape, layout: Layout, precision: Precision) -> float:
    """Return the bytes per token of the norm behind the last layer; what the head reads is counted with it."""
    stream = _stream(shape, layout)
    return stream * (_size(precision.compute) if layout.fused_layers else 8) + 4 * stream / shape.hidden


def _stream(shape: Shape, layout: Layout) -> float:
    """Return the elements of the residual stream on one rank, per token."""
    return shape.hidden / (layout.tensor if layout.sequence else 1)


def _size(dtype: Literal["bf16", "fp32"]) -> int:
    return {"bf16": 2, "fp32": 4}[dtype]
