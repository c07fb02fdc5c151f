"""Model chunks in a pipeline: a forward-backward pass over a step's microbatches, or a forward pass as a function.

Axes: B sequences, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megadiff.parallel.attention_pattern import AttentionPattern
from megadiff.parallel.topology import Topology

Loss = tuple[Tensor, Tensor, Any]
"""Tuple of (summed loss of the microbatch, its number of counted tokens as an int32 scalar, anything to return)."""

LossFn = Callable[[Tensor, Tensor], Any]
"""Function (hidden states [sequence, batch, hidden], the same on every tensor rank; this rank's shard of the LM head's
weight [V / tp, hidden]) -> anything. The gradient of the hidden states must be this rank's contribution."""

DataParallelChunk = DistributedDataParallel
"""A chunk inside megatron-core's wrapper, which holds its gradient buffers."""


class ModelChunk(Protocol):
    """One pipeline stage's chunk of the model: bare, or inside its precision and data-parallel wrappers."""

    config: Any
    """megatron-core's `TransformerConfig`."""
    training: bool
    """Whether the chunk is in training mode."""

    def __call__(
        self, input_ids: Tensor | None, attention: Tensor | None = None, *, loss_fn: LossFn | None = None
    ) -> Any:
        """Run the chunk; see `megadiff.model.denoiser.Denoiser.forward`."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Switch training mode on or off."""
        ...

    def eval(self) -> Any:
        """Switch training mode off."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Iterate over the parameters."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Iterate over the parameters with their names."""
        ...

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the chunk's tensors as megatron-core's dist_checkpointing takes them."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """Load the chunk's tensors."""
        ...


def run_microbatches(
    chunks: Sequence[ModelChunk],
    microbatches: Sequence[Any],
    *,
    forward: Callable[[Any, Any], Any],
    loss: Callable[[Any, Any], Loss],
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool = False,
) -> list[Any]:
    """Run every microbatch through the pipeline: 1F1B, interleaved, or without stages.

    Args:
        chunks: this rank's model chunks.
        microbatches: those of this data-parallel rank, the same list on every stage and tensor rank.
        forward: (chunk, microbatch) -> that chunk's output; a tensor, except on the last stage, where it is the input
            of `loss`.
        loss: (last stage's output, microbatch) -> `Loss`. Gradients of the summed losses are divided by the number of
            counted tokens over all microbatches and replicas, or not at all, as set by `set_loss_reduction`.
        seq_length, micro_batch_size: shape of a microbatch.
        forward_only: compute no gradients.

    Returns:
        The third element of each `Loss`, by microbatch; empty except on the last stage. Collective over a model group.
    """

    def forward_step(data: Any, chunk: torch.nn.Module, *_: Any) -> tuple[Any, Callable[[Any], Loss]]:
        microbatch = next(data)
        return forward(chunk, microbatch), lambda output: loss(output, microbatch)

    iterators = [iter(microbatches) for _ in chunks]
    interleaved = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if interleaved else iterators[0],
        model=list(chunks) if interleaved else chunks[0],  # type: ignore[arg-type]
        num_microbatches=len(microbatches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


@contextmanager
def unreduced(chunks: Sequence[DataParallelChunk]) -> Iterator[None]:
    """Leave gradients of backward passes inside the block as they are on this replica.

    They are summed over tensor ranks where each has a part, but neither over replicas nor divided. The chunks' gradient
    buffers must be zeroed before the block, which makes them ready for a step.
    """
    config = chunks[0].config
    kept = config.no_sync_func, config.finalize_model_grads_func

    def finalize(model: Any, num_tokens: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
        del num_tokens
        _reduce_gradients(model, *args, **kwargs)

    with ExitStack() as stack:
        for chunk in chunks:
            stack.enter_context(chunk.no_sync())
            chunk.finish_grad_sync = lambda *_, **__: None  # type: ignore[method-assign]
            stack.callback(delattr, chunk, "finish_grad_sync")
        config.no_sync_func, config.finalize_model_grads_func = None, finalize
        try:
            yield
        finally:
            config.no_sync_func, config.finalize_model_grads_func = kept


def set_loss_reduction(chunks: Sequence[ModelChunk], topology: Topology, *, mean: bool) -> None:
    """Choose the divisor of the summed gradients: the global number of tokens (`mean`), or none (sum)."""

    def finalize(model: Any, num_tokens: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
        _reduce_gradients(model, *args, **kwargs)
        if mean and num_tokens is not None:
            _divide(model, num_tokens, topology)

    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize  # type: ignore[union-attr]


def _reduce_gradients(chunks: Sequence[DataParallelChunk], *args: Any, **kwargs: Any) -> None:
    """Sum gradients over replicas, and over ranks of a replica where each has a part of a parameter's gradient.

    On a single tensor rank, with embedding and head apart or on one stage, the first is all that megatron-core's
    `finalize_model_grads` does here, but it looks at every module of the model.
    """
    config = chunks[0].config
    has_copies = config.pipeline_model_parallel_size > 1 and _is_tied(chunks[0])
    if config.tensor_model_parallel_size > 1 or has_copies:
        finalize_model_grads(list(chunks), None, *args, **kwargs)  # type: ignore[arg-type]
        return
    for chunk in chunks:
        chunk.finish_grad_sync()


def _is_tied(chunk: DataParallelChunk) -> bool:
    return bool(get_attr_wrapped_model(chunk, "share_embeddings_and_output_weights"))


def _divide(chunks: Sequence[DataParallelChunk], num_tokens: Tensor, topology: Topology) -> None:
    """Divide gradients by the number of tokens of all replicas, known on the last stage; not at all if it is zero.

    It replaces the end of megatron-core's `finalize_model_grads`, which checks on the device whether there are any and
    so makes the host wait once per chunk. Collective over the pipeline and the data group.
    """
    if topology.layout.pipeline > 1:
        last = dist.get_process_group_ranks(topology.pipeline_group)[-1]
        dist.broadcast(num_tokens, src=last, group=topology.pipeline_group)
    if topology.layout.data > 1:
        dist.all_reduce(num_tokens, group=topology.data_group)
    scale = 1.0 / num_tokens.clamp(min=1)
    for chunk in chunks:
        chunk.scale_gradients(scale)  # type: ignore[arg-type]


_DONE = -1


class DistributedForward:
    """A model spread over ranks, as a function that a sampler can call; gradients are not affected.

    Only ids travel: a step's logits, a gigabyte for a large vocabulary, stay on the rank that requested them. Every
    replica computes the same; the driver rank belongs to the first one.

    Args:
        chunks: this rank's model chunks, as they are trained.
        topology: the process groups.
        device: this rank's device.
        shape: [B, L] of the ids; sequence parallelism must divide L, as it does for a training sequence.
        attention: attention of sequences whose first tokens are a clean prompt, by (prompt lengths [B], L).
        vocab_size: V; columns of the padded vocabulary beyond it are dropped.
    """

    def __init__(
        self,
        chunks: Sequence[ModelChunk],
        *,
        topology: Topology,
        device: torch.device,
        shape: tuple[int, int],
        attention: Callable[[Tensor, int], AttentionPattern],
        vocab_size: int,
    ) -> None:
        """Choose the driver rank: the first tensor rank of the last stage of the first replica."""
        self._chunks, self._topology, self._device = chunks, topology, device
        self._shape, self._attention, self._vocab_size = shape, attention, vocab_size
        self._asks = topology.is_last_stage and topology.tensor_rank == 0 and topology.data_rank == 0

    def run(self, work: Callable[[Callable[[Tensor, int], Tensor]], Tensor]) -> Tensor:
        """Run `work` on one rank, which may compute logits any number of times; return its result on every rank.

        Collective over the world.

        Args:
            work: maps a function, (ids [B, L] int64, number of clean prompt tokens) to logits [B, L, V] on the device,
                to ids [B, L].

        Returns:
            [B, L] int64, on the host.
        """
        asker = self._topology.largest(self._topology.rank if self._asks else -1)
        if self._asks:

            def ask(ids: Tensor, prompt_length: int) -> Tensor:
                self._passed_on(prompt_length, ids, asker)
                return self._logits(ids, prompt_length)

            return self._passed_on(_DONE, work(ask), asker)[1]
        while True:
            prompt_length, ids = self._passed_on(None, None, asker)
            if prompt_length == _DONE:
                return ids
            self._logits(ids, prompt_length)

    def _passed_on(self, what: int | None, ids: Tensor | None, asker: int) -> tuple[int, Tensor]:
        """Broadcast ids to every rank, after the length of their prompt, or `_DONE` if they are the result."""
        message = torch.zeros(1 + self._shape[0] * self._shape[1], dtype=torch.int64)
        if what is not None and ids is not None:
            message[0], message[1:] = what, ids.flatten()
        dist.broadcast(message, src=asker, group=self._topology.host_group)
        return int(message[0]), message[1:].reshape(self._shape)

    @torch.no_grad()
    def _logits(self, ids: Tensor, prompt_length: int) -> Tensor:
        """Return complete logits [B, L, V] on the last stage of every replica; a placeholder elsewhere."""
        layout = self._topology.layout
        # The interleaved schedule needs a multiple of the stages, so the same sequences are repeated.
        copies = layout.pipeline if layout.virtual_pipeline > 1 else 1
        nothing = torch.zeros((), device=self._device)
        codes = self._attention(torch.full((self._shape[0],), prompt_length), self._shape[1]).codes()
        found = run_microbatches(
            self._chunks,
            [ids.to(self._device)] * copies,
            forward=lambda chunk, sequences: chunk(sequences, codes),
            loss=lambda logits, _: (nothing, nothing.int(), self._gathered(logits)),
            seq_length=self._shape[1],
            micro_batch_size=self._shape[0],
            forward_only=True,
        )
        return found[0] if found else nothing

    def _gathered(self, logits: Tensor) -> Tensor:
        """Gather the shards [L, B, padded V / tensor ranks] of all tensor ranks, [B, L, V]."""
        parts = [logits]
        if self._topology.layout.tensor > 1:
            parts = [torch.empty_like(logits) for _ in range(self._topology.layout.tensor)]
            dist.all_gather(parts, logits.contiguous(), group=self._topology.tensor_group)
        return torch.cat(parts, dim=-1)[..., : self._vocab_size].transpose(0, 1)
