"""The denoiser: token ids in, logits over clean tokens out, with attention in both directions.

The model knows no noise and computes no loss. It is composed of megatron-core's embedding, TransformerBlock (which
ends in the final norm) and column-parallel output layer, so tensor, sequence and pipeline parallelism come from there;
`transformer_config` is that library's configuration of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megadiff.model.attention import common_attention
from megadiff.model.config import ModelConfig, PrecisionConfig, RopeScaling, megatron_settings
from megadiff.model.kernels import fuses_weight_gradients, layers_for
from megadiff.model.layers import ACTIVATIONS, CompiledBlock, LayerModules, block_spec, local_parts, runs_alone
from megadiff.model.rope import scaled_frequencies
from megadiff.parallel.config import ParallelConfig
from megadiff.parallel.pipeline import LossFn
from megadiff.parallel.topology import Topology
from megadiff.platform.machine import Platform
from megadiff.platform.quiet import quiet


class LMHead(ColumnParallelLinear):
    """The output layer: returns logits, or passes its whole input and its weight to a loss function.

    A loss function can compute the objective from the hidden states and this rank's vocabulary entries without ever
    holding whole logits.
    """

    is_shifted: bool = False
    """Whether each position's states predict the token after it; loss functions and callers still get, at every
    position, what predicts the token there."""

    def forward(  # type: ignore[override]
        self,
        input_: Tensor,
        loss_fn: LossFn | None = None,
        embedding: Tensor | None = None,
        is_first: Tensor | None = None,
    ) -> Any:
        """Return (logits [sequence, batch, V / tp], None) as the parent class does, or the result of `loss_fn`.

        A head without a weight of its own takes the `embedding`. A head that is shifted needs to know which tokens
        begin a document, [sequence, batch, 1] bool; None if only the first of a sequence does.
        """
        if loss_fn is None:
            logits, bias = super().forward(input_, weight=embedding)
            return (_at_targets(logits, is_first) if self.is_shifted else logits), bias
        if runs_alone(self):
            whole = input_
        elif self.sequence_parallel:
            whole = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            whole = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        weight = self.weight if embedding is None else embedding
        assert weight is not None
        return loss_fn(_at_targets(whole, is_first) if self.is_shifted else whole, weight)


def _at_targets(states: Tensor, is_first: Tensor | None) -> Tensor:
    """Move states [sequence, ...] by one position to the tokens that they predict; the first ones also stay."""
    moved = torch.cat((states[:1], states[:-1]))
    return moved if is_first is None else torch.where(is_first, states, moved)


def _first_tokens(attention: Tensor, length: int) -> Tensor:
    """Return which tokens begin a document, [length, batch, 1] bool, from the codes of documents, [batch, K]."""
    lengths = attention.abs()
    starts = lengths.cumsum(1) - lengths  # of what fills a row of codes up, `length`
    is_first = torch.zeros(len(lengths), length + 1, dtype=torch.bool).scatter_(1, starts, True)
    return is_first[:, :length].t().unsqueeze(-1)


class Denoiser(MegatronModule):
    """One pipeline stage's chunk of the model.

    Parameter names are those of megatron-core's language models (`embedding.word_embeddings`, `decoder.layers.N`,
    `decoder.final_layernorm`, `output_layer`), so checkpoints are laid out like theirs.

    Args:
        config: megatron-core's settings.
        spec: the Transformer block, `layers.block_spec`.
        vocab_size: entries of the embedding and the LM head, padding included.
        seq_length: number of tokens of a training sequence.
        rope_base: base of the rotary angles.
        rope_scaling: change of the rotary angles for longer sequences; None for none.
        head_factor: factor of the last hidden states before the LM head.
        is_tied: whether the LM head is the embedding.
        is_shifted: whether each position predicts the token after it (`model.alignment`).
        pre_process: whether this chunk starts with the embedding.
        post_process: whether this chunk ends with the final norm and the LM head.
        vp_stage: index of this chunk among the rank's virtual pipeline stages; None where a rank holds one chunk.
        is_compiled: whether the layers are compiled for training steps; evaluation never compiles.
    """

    share_embeddings_and_output_weights = False
    """megatron-core sums the gradients of tied embeddings between the first and the last stage where this is set."""

    def __init__(
        self,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules,
        *,
        vocab_size: int,
        seq_length: int,
        rope_base: float,
        rope_scaling: RopeScaling | None = None,
        head_factor: float = 1.0,
        is_tied: bool = False,
        is_shifted: bool = False,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        is_compiled: bool = False,
    ) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder  # read by megatron-core's pipeline schedules
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.vocab_size = vocab_size
        self.seq_length = seq_length
        self.head_factor = head_factor
        self.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size=vocab_size,
                max_sequence_length=seq_length,
                position_embedding_type="rope",
                tp_group=self.pg_collection.tp,
            )
        self.rotary_pos_emb = _rotation(config, spec, rope_base, rope_scaling, self.pg_collection)
        self.decoder = TransformerBlock(
            config,
            spec,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        self.compiled_block = CompiledBlock(self.decoder) if is_compiled else None
        if post_process:
            self.output_layer = LMHead(
                config.hidden_size,
                vocab_size,
                config=config,
                init_method=keep,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=is_tied and pre_process,
                tp_group=self.pg_collection.tp,
            )
            self.output_layer.is_shifted = is_shifted
        self.share_embeddings_and_output_weights = is_tied
        self._mark_tables()

    def _mark_tables(self) -> None:
        """Mark embedding and head for megatron-core's optimizers.

        A tied head on another stage than the embedding is a copy: it has the same first weights, the gradients of both
        are added up (`finalize_model_grads`), and the gradient norm counts the embedding alone.
        """
        for weight in self._tables():
            weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
        if self.share_embeddings_and_output_weights and self.pre_process != self.post_process:
            for weight in self._tables():
                weight.shared_embedding = True  # type: ignore[attr-defined]
                weight.shared = self.post_process  # type: ignore[attr-defined]

    def _tables(self) -> list[Tensor]:
        embedding = [self.embedding.word_embeddings.weight] if self.pre_process else []
        head = [self.output_layer.weight] if self.post_process and self.output_layer.weight is not None else []
        return [*embedding, *head]

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Return this chunk's table of a tied model; megatron-core adds up the gradients of both stages' tables."""
        return self._tables()[0]

    @property
    def head_weight(self) -> Tensor:
        """The last stage's table of the head, [padded vocabulary / tensor ranks, hidden]."""
        return self._tables()[-1]

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Set the hidden states that the previous pipeline stage sent; megatron-core's schedules call this."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self, input_ids: Tensor | None, attention: Tensor | None = None, *, loss_fn: LossFn | None = None
    ) -> Any:
        """Run this chunk.

        Args:
            input_ids: [batch, sequence] int64 on the first stage; elsewhere None is fine (hidden states arrive by
                `set_input_tensor`) and the sequence length is the model's.
            attention: [batch] or [batch, K] int64 on the CPU, the codes of an `AttentionPattern`, or None if every
                token sees every token.
            loss_fn: what to apply to the last hidden states and the LM head's weight instead of computing logits.

        Returns:
            On the last stage the result of `loss_fn`, or without one logits [sequence, batch, padded vocabulary /
            tensor ranks]; elsewhere hidden states. The sequence axis comes first, as megatron-core computes it, so that
            no transposing copy is made.
        """
        length = self.seq_length if input_ids is None else input_ids.shape[1]
        hidden = self.embedding(input_ids=input_ids, position_ids=None) if self.pre_process else None
        hidden = self._run_block(hidden, attention, self.rotary_pos_emb(length))
        if not self.post_process:
            return hidden
        if self.head_factor != 1.0:
            hidden = hidden * self.head_factor
        # A view, as the fused objective adds to the gradient buffer of a parameter, and returns the gradient of others;
        # in bf16 that gradient is rounded before it joins the embedding's.
        embedding = None if self.output_layer.weight is not None else self.head_weight.view_as(self.head_weight)
        is_first = None
        if self.output_layer.is_shifted and attention is not None and attention.dim() > 1:
            is_first = _first_tokens(attention, length).to(hidden.device, non_blocking=True)
        if loss_fn is not None:
            return self.output_layer(hidden, loss_fn, embedding, is_first)
        logits, _ = self.output_layer(hidden, embedding=embedding, is_first=is_first)
        return logits

    def _run_block(self, hidden: Tensor | None, attention: Tensor | None, rotation: Tensor) -> Tensor:
        """Run the layers and the last norm, compiled if all sequences of a training step attend alike."""
        if self.compiled_block is not None and self.training and torch.is_grad_enabled():
            codes = [] if attention is None else attention.tolist()
            is_causal = common_attention(codes, length=rotation.shape[1])
            if is_causal is not None:
                states = hidden if self.pre_process else self.decoder.input_tensor
                assert states is not None
                return self.compiled_block(states, rotation, is_causal=is_causal)
        return self.decoder(hidden_states=hidden, attention_mask=attention, rotary_pos_emb=rotation)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return this chunk's tensors as megatron-core's dist_checkpointing takes them.

        The tables may change their number of padding entries between layouts, and the LM head has no extra state.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.pop(f"{prefix}output_layer._extra_state", None)
        head = f"{prefix}output_layer.weight"
        if not self.post_process:
            return state
        if not self.share_embeddings_and_output_weights:
            state[head].allow_shape_mismatch = True
        elif self.pre_process:
            state.pop(head, None)
        else:  # as a copy of the first stage's embedding
            state[head] = make_tp_sharded_tensor_for_checkpoint(
                self.head_weight,
                f"{prefix}embedding.word_embeddings.weight",
                replica_id=(1, 0, self.pg_collection.dp_cp.rank()),
                allow_shape_mismatch=True,
            )
        return state


def _rotation(
    config: TransformerConfig,
    spec: TransformerBlockSubmodules,
    base: float,
    scaling: RopeScaling | None,
    groups: ProcessGroupCollection,
) -> RotaryEmbedding:
    """Return the rotary embedding, in the form that the layers take."""
    layers: Any = spec.layer_specs
    built = getattr(layers[0].module, "rotary_embedding", RotaryEmbedding)(
        kv_channels=config.kv_channels,  # type: ignore[arg-type]
        rotary_percent=1.0,
        rotary_base=base,  # type: ignore[arg-type]  it is only the base of a power
        use_cpu_initialization=config.use_cpu_initialization,
        cp_group=groups.cp,
    )
    if scaling is not None:
        built.inv_freq = scaled_frequencies(built.inv_freq, base, **scaling.model_dump())
    return built


class _Bf16Chunk(Float16Module):
    """Casts a chunk to bf16 and leaves its logits so: the objective reads bf16 and computes in float32."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return super().forward(*inputs, fp32_output=False, **kwargs)


class _DataParallel(DistributedDataParallel):
    """megatron-core's wrapper, shorter where nothing overlaps with the backward pass.

    The hook after each parameter's gradient only adds it to the buffer, and a single replica communicates nothing: its
    collectives would hand the buffer to a thread of the backend and wait for it.
    """

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        if self.ddp_config.overlap_grad_reduce:
            return super()._make_backward_post_hook(param)

        def add_to_buffer(*_: Any) -> None:
            if param.grad is not None and not param.grad_added_to_main_grad:  # type: ignore[attr-defined]
                param.main_grad.add_(param.grad)  # type: ignore[attr-defined]
            param.grad = None

        return add_to_buffer

    def finish_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        """Sum the gradients over the replicas, if there are others."""
        if self.ddp_config.overlap_grad_reduce or self.intra_dp_cp_group.size() > 1:
            super().finish_grad_sync(*args, **kwargs)


def transformer_config(
    model: ModelConfig, *, parallel: ParallelConfig, precision: PrecisionConfig, platform: Platform
) -> TransformerConfig:
    """megatron-core's settings for this model on this machine.

    Batched P2P is off on gloo, and with interleaving everywhere: two stages with virtual chunks exchange two messages
    each way in one batch and megatron-core matches them crosswise, wrong gradients without an error (its check lives
    in `megatron.training`, not in core). Overlapped P2P is off: on gloo a deallocated output races with its own send.
    """
    dtype = torch.bfloat16 if precision.compute == "bf16" else torch.float32
    interleaved = parallel.virtual_pipeline > 1
    layers = layers_for(precision, platform)
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.key_heads,
        ffn_hidden_size=model.mlp_width,
        kv_channels=model.head_width,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        layernorm_zero_centered_gamma=True,
        qk_layernorm=model.qk_norm != "none",
        add_bias_linear=model.mlp_bias,
        activation_func=ACTIVATIONS[model.mlp],
        gated_linear_unit=False,  # a gate is a matter of `layers.gated_mlp` and its activation
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=keep,
        output_layer_init_method=keep,
        embedding_init_method=keep,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.compute == "bf16",
        use_cpu_initialization=platform.is_cpu and (platform.has_values or layers == "local"),
        gradient_accumulation_fusion=fuses_weight_gradients(parallel, precision, platform),
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        calculate_per_token_loss=True,
        batch_p2p_comm=not platform.is_cpu and not interleaved,
        overlap_p2p_comm=False,
        deallocate_pipeline_outputs=not platform.is_cpu,
        tp_comm_overlap=parallel.tp_comm_overlap,
        apply_rope_fusion=layers == "transformer_engine",
        **_recomputation(parallel, chunk_layers=model.layers // (parallel.pipeline * parallel.virtual_pipeline)),
        **megatron_settings(precision),
    )


def _recomputation(parallel: ParallelConfig, *, chunk_layers: int) -> dict[str, Any]:
    """megatron-core's words for what is computed again in the backward pass."""
    if parallel.recompute == "none":
        return {}
    if parallel.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(parallel.recomputed_modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": "block",  # each block's input is kept, of as many blocks of a chunk as are named
        "recompute_num_layers": parallel.recompute_layers or chunk_layers,
    }


def keep(weight: Tensor) -> Tensor:
    """Leave a weight as it is: initialisation happens once, by name, after construction (`initialise`)."""
    return weight


def modules_for(parallel: ParallelConfig, precision: PrecisionConfig, platform: Platform) -> LayerModules:
    """Return the modules of a block on this machine.

    Parts of a layer are recomputed by megatron-core's own layer alone.
    """
    if layers_for(precision, platform) != "local":
        return import_module("megadiff.model.fused_layers").fused_parts()
    parts = local_parts()
    return replace(parts, layer=TransformerLayer) if parallel.recompute == "selective" else parts


def build_chunks(
    model: ModelConfig,
    *,
    vocab_size: int,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    platform: Platform,
    topology: Topology,
) -> list[Denoiser]:
    """Build this rank's model chunks on its device, weights not yet drawn (see `initialise`).

    Args:
        vocab_size: real ids including the mask; the tables are padded to `model.vocab_multiple`.
    """
    with quiet():
        config = transformer_config(model, parallel=parallel, precision=precision, platform=platform)
        parts = modules_for(parallel, precision, platform)
    tensor_parallel.model_parallel_cuda_manual_seed(0)  # nothing draws from it; the embedding asks that it exists
    virtual = topology.layout.virtual_pipeline
    chunks = []
    for index in range(virtual):
        stage = index if virtual > 1 else None
        with platform.default_device():
            chunk = Denoiser(
                config,
                block_spec(model, parts, layers=get_num_layers_to_build(config, vp_stage=stage)),
                vocab_size=model.padded_vocab_size(vocab_size),
                seq_length=model.seq_length,
                rope_base=model.rope_base,
                rope_scaling=model.rope_scaling,
                head_factor=model.head_factor,
                is_tied=model.tie_embeddings,
                is_shifted=model.alignment == "shifted",
                pre_process=topology.is_first_stage and index == 0,
                post_process=topology.is_last_stage and index == virtual - 1,
                vp_stage=stage,
                is_compiled=precision.compile,
            )
        for layer in chunk.decoder.layers:  # for optimizers that update whole matrices
            layer.self_attention.linear_qkv.weight.packed_rows = model.qkv_rows  # type: ignore[union-attr]
            if model.is_gated:
                layer.mlp.linear_fc1.weight.packed_rows = (1, 1)  # type: ignore[union-attr]
        chunks.append(chunk.to(platform.device))
    # After the backward pass megatron-core adds up over tensor ranks the gradients of all norms of queries and keys if
    # this is set, as only the gains need that which every rank holds whole (finalize_model_grads.py).
    config.qk_layernorm = model.qk_norm == "head"
    return chunks


def wrap_data_parallel(
    chunks: list[Denoiser], *, parallel: ParallelConfig, precision: PrecisionConfig
) -> list[DistributedDataParallel]:
    """Give each chunk its compute precision and its data-parallel gradient buffers.

    Gradients are reduced in float32, but for bf16 without master weights, whose updates could not use it.
    """
    config = chunks[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=precision.master_weights,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
        average_in_collective=False,
    )
    cast: list[Any] = list(chunks)
    if precision.compute == "bf16":
        cast = [_Bf16Chunk(config, chunk) for chunk in chunks]
    wrapped: list[DistributedDataParallel] = [
        _DataParallel(config, ddp_config, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(cast)
    ]
    if parallel.overlap_grad_reduce:
        # Without it every microbatch's backward pass, and not the step's last alone, would reduce the gradients.
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]  # type: ignore[assignment]
    return wrapped


@contextmanager
def gathered_weights(wrapped: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Hold every rank's weights complete inside the block.

    With overlapped gathering the weights an update changed reach the other replicas only in the next forward pass:
    what is saved before it would be one update old in every part this rank does not own.
    """
    overlapped = [chunk for chunk in wrapped if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()
