"""A sharded model run as a function: a driver rank broadcasts ids, all ranks run forward, the driver gets the logits.

Axes: B sequences, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megadiff.parallel.attention_pattern import AttentionPattern
from megadiff.parallel.pipeline import ModelChunk, run_microbatches
from megadiff.parallel.topology import Topology

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
