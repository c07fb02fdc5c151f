"""The denoiser: token ids in, logits over clean tokens out, attention both ways.

It knows no noise and returns no loss. Built of megatron-core's parts through a layer spec, so tensor, sequence and
pipeline parallelism are the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor

from megadiff.model.config import ModelConfig, PrecisionConfig
from megadiff.model.kernels import parts_for
from megadiff.model.layer_spec import block_spec
from megadiff.model.megatron_config import keep, transformer_config
from megadiff.parallel.config import ParallelConfig
from megadiff.parallel.topology import Topology
from megadiff.platform.machine import Platform
from megadiff.platform.quiet import quiet

Score = Callable[[Tensor, Tensor], Any]
"""(hidden states [sequence, batch, hidden] whole on every tensor rank, this rank's head weight [V / tp, hidden]) ->
anything; the gradient of the states is to be this rank's part."""


class Head(ColumnParallelLinear):
    """The output layer: logits, or a score made of its input and weight without logits that are ever whole."""

    def forward(self, input_: Tensor, score: Score | None = None) -> Any:  # type: ignore[override]
        """(logits [sequence, batch, V / tp], None) as the parent's, or what `score` makes of the whole input."""
        if score is None:
            return super().forward(input_)
        if self.sequence_parallel:
            whole = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            whole = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        assert self.weight is not None
        return score(whole, self.weight)


class Denoiser(GPTModel):
    """One pipeline stage's chunk of the model."""

    head_factor: float = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer = Head(
                self.config.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=keep,
                bias=False,
                gather_output=False,
                tp_group=self.pg_collection.tp,
            )

    def forward(  # type: ignore[override]
        self, input_ids: Tensor | None, prompts: Tensor | None = None, *, score: Score | None = None
    ) -> Any:
        """Run this chunk.

        Args:
            input_ids: [batch, sequence] int64 on the first stage; elsewhere None is fine (hidden states arrive by
                `set_input_tensor`) and the row length is the model's.
            prompts: [batch] lengths of clean prompts that see only themselves (`attention.prompt_code`), or None:
                every token sees every token.
            score: what becomes of the last hidden states and the head instead of logits.

        Returns:
            On the last stage what `score` returns, or without one logits [sequence, batch, padded vocabulary / tensor
            ranks]; elsewhere hidden states. Sequence first, as megatron-core computes them: no transposing copy is
            made.
        """
        length = self.max_sequence_length if input_ids is None else input_ids.shape[1]
        hidden = self.embedding(input_ids=input_ids, position_ids=None) if self.pre_process else None
        hidden = self.decoder(hidden_states=hidden, attention_mask=prompts, rotary_pos_emb=self.rotary_pos_emb(length))
        if not self.post_process:
            return hidden
        if self.head_factor != 1.0:
            hidden = hidden * self.head_factor
        if score is not None:
            return self.output_layer(hidden, score)
        logits, _ = self.output_layer(hidden)
        return logits


class _Bf16Chunk(Float16Module):
    """Casts a chunk to bf16 and leaves its logits so: the objective reads bf16 and computes in float32."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return super().forward(*inputs, fp32_output=False, **kwargs)


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
        parts = parts_for(precision, platform)
    tensor_parallel.model_parallel_cuda_manual_seed(0)  # nothing draws from it; the embedding asks that it exists
    virtual = topology.layout.virtual_pipeline
    chunks = []
    for index in range(virtual):
        stage = index if virtual > 1 else None
        chunk = Denoiser(
            config,
            block_spec(model, parts, layers=get_num_layers_to_build(config, vp_stage=stage)),
            vocab_size=model.padded_vocab_size(vocab_size),
            max_sequence_length=model.seq_length,
            pre_process=topology.is_first_stage and index == 0,
            post_process=topology.is_last_stage and index == virtual - 1,
            position_embedding_type="rope",
            rotary_base=model.rope_base,
            share_embeddings_and_output_weights=False,
            parallel_output=True,
            vp_stage=stage,
        )
        chunk.head_factor = model.head_factor
        chunks.append(chunk.to(platform.device))
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
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(cast)
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
