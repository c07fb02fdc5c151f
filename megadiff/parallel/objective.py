"""Objectives of a microbatch: from the last stage's hidden states and its sequences to a summed loss and a report.

An `Objective` is what a training method or an evaluation minimises or measures; a `ShardedObjective` runs one on this
rank's shard of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megadiff.diffusion.conditioning import NoisePattern
from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.noising import NoisedBatch
from megadiff.diffusion.objective import SURROGATE, Weighting
from megadiff.diffusion.schedules import LINEAR, LinearSchedule
from megadiff.loss.fused_lm_head import LossKernel, fused_objective
from megadiff.loss.lm_head import LossInputs, LossOutput, LossSpec, VocabShard, loss_token_indices
from megadiff.parallel.attention_pattern import AttentionPattern
from megadiff.parallel.pipeline import ModelChunk
from megadiff.parallel.step_metrics import SequenceCounts, report_sums, sequence_counts
from megadiff.parallel.topology import Topology

_ALL_KEPT = 40.0
"""Log-SNR at which alpha is 1 in float32 and p(lambda) is still far from underflow."""


class DeviceBatch(NamedTuple):
    """A microbatch on its device."""

    sequences: NoisedBatch
    """Sequences on the device, except prompt lengths and documents, which stay on the CPU."""
    active_indices: Tensor | None
    """Positions, sequence first, of the tokens that can have a loss (`Objective.loss_tokens`); None for all."""
    attention: AttentionPattern
    """The attention of the sequences, on the CPU: attention reads it without waiting for the device."""
    counts: SequenceCounts | None = None
    """The report's counts of the sequences, on the device; None on stages other than the last."""


class Objective(Protocol):
    """The part of a training method that a microbatch of sequences needs: its attention and its loss."""

    @property
    def process(self) -> NoiseProcess:
        """The noise, which also knows the vocabulary and its mask."""
        ...

    def attention(self, batch: NoisedBatch) -> AttentionPattern:
        """Return the attention of a microbatch on the CPU."""
        ...

    def loss_tokens(self, batch: NoisedBatch) -> Tensor | None:
        """Return the positions of the tokens that can have a loss, [n] int64, in the flattened axes [L, B]; None for
        all. Computed on the CPU, since the host has to know their number."""
        ...

    def loss(self, hidden: Tensor, lm_head_weight: Tensor, batch: DeviceBatch, shard: VocabShard) -> LossOutput:
        """Return summed loss and per-token terms, sequence first.

        Args:
            hidden: [L, B, D], the same on all tensor ranks; its gradient is this rank's part.
            lm_head_weight: [padded vocabulary / tensor ranks, D], this rank's columns of the LM head.
            batch: the microbatch on its device.
            shard: the columns of the vocabulary that this rank holds.
        """
        ...


@dataclass(frozen=True)
class ShardedObjective:
    """An objective on this rank's shard of the vocabulary, as training and validation run it."""

    objective: Objective
    topology: Topology

    def place(self, sequences: NoisedBatch, device: torch.device) -> DeviceBatch:
        """Move a microbatch to the device, after determining on the host which of its tokens count."""
        active_indices = self.objective.loss_tokens(sequences)
        host = sequences._replace(documents=None)
        moved = NoisedBatch(**{name: _moved(column, device) for name, column in host.columns().items()})
        if active_indices is not None:
            active_indices = _moved(active_indices, device)
        moved = moved._replace(prompt_length=sequences.prompt_length, documents=sequences.documents)
        attention, counts = self.objective.attention(sequences), None
        if self.topology.is_last_stage:
            pairs = attention.pairs(sequences.noised.shape[1])
            counts = sequence_counts(sequences, pairs=pairs).moved(lambda tensor: _moved(tensor, device))
        return DeviceBatch(moved, active_indices, attention, counts)

    def forward(self, chunk: ModelChunk, placed: DeviceBatch) -> Any:
        """Run a model chunk on a microbatch; on the last stage the result is its `LossOutput`."""
        return chunk(placed.sequences.noised, placed.attention.codes(), loss_fn=self.loss_fn(placed))

    def loss_fn(self, placed: DeviceBatch) -> Callable[[Tensor, Tensor], LossOutput]:
        """Return the function of hidden states and LM head weight that the last stage calls."""

        def loss(hidden: Tensor, weight: Tensor) -> LossOutput:
            start = self.topology.tensor_rank * weight.shape[0]
            shard = VocabShard.of(weight, self.objective.process, start=start, group=self.topology.tensor_group)
            return self.objective.loss(hidden, weight, placed, shard)

        return loss

    def report(self, output: LossOutput, placed: DeviceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the summed loss over noisy tokens, their number, and the sums of `step_metrics`."""
        assert placed.counts is not None
        sums = report_sums(output.terms, placed.sequences, placed.counts, head_tokens=output.head_tokens)
        return output.loss, placed.sequences.is_noisy.sum().int(), sums


@dataclass(frozen=True)
class DiffusionObjective:
    """The loss of a denoiser: the diffusion bound, its surrogate, or what another weighting makes of its terms."""

    process: NoiseProcess
    weighting: Weighting = SURROGATE
    loss_kernel: LossKernel = fused_objective
    is_causal_prompt: bool = False
    """Whether tokens of a clean prompt attend only to themselves and those before them."""

    def attention(self, batch: NoisedBatch) -> AttentionPattern:
        """Return full attention, except that a clean prompt, and each of several documents, attends to itself alone."""
        if batch.documents is not None:
            return AttentionPattern.within(batch.documents)
        return AttentionPattern.prefix(batch.prompt_length, is_causal=self.is_causal_prompt)

    def loss_tokens(self, batch: NoisedBatch) -> Tensor | None:
        """Return the noisy tokens, and under masked noise only the masks; see `Objective.loss_tokens`."""
        return loss_token_indices(batch.noised.t(), batch.is_noisy.t(), self.process)

    def loss(self, hidden: Tensor, lm_head_weight: Tensor, batch: DeviceBatch, shard: VocabShard) -> LossOutput:
        """Return loss and terms; see `Objective.loss` and `diffusion.objective`."""
        sequences = batch.sequences
        tokens = LossInputs(sequences.clean.t(), sequences.noised.t(), sequences.log_snr.t(), batch.active_indices)
        spec = LossSpec(self.process, self.weighting)
        output = self.loss_kernel(hidden, lm_head_weight, tokens, spec, shard=shard)
        return output._replace(terms=output.terms._replace(elbo=self._reported_elbo(output.terms.elbo, sequences)))

    def _reported_elbo(self, elbo: Tensor, sequences: NoisedBatch) -> Tensor:
        """Return the bound's integrand [L, B] divided by the density that each token's level was really drawn from.

        The result has one definition for every schedule (`NoiseSchedule.reporting_density`). Sequences of
        `NoisePattern.LINEAR` follow the linear schedule whatever the others do, so their tokens are divided by
        its density.
        """
        schedule = self.process.schedule
        if isinstance(schedule, LinearSchedule):
            return elbo
        log_snr = sequences.log_snr.t()
        is_linear = sequences.pattern == NoisePattern.LINEAR
        drawn = torch.where(is_linear, LINEAR.density(log_snr), schedule.reporting_density(log_snr))
        return elbo * (schedule.density(log_snr) / drawn)


@dataclass(frozen=True)
class NextTokenObjective:
    """Cross-entropy of the next token over the real tokens, with causal attention.

    It is the masked limit of the diffusion loss with everything kept: with z the mask and alpha = 1 the loss is
    w KL = -log p_x, computed by the same sharded code (the mask and padding are excluded in the same way).
    """

    process: NoiseProcess
    loss_kernel: LossKernel = fused_objective

    def attention(self, batch: NoisedBatch) -> AttentionPattern:
        """Return causal attention over whole sequences, or within each of their documents."""
        if batch.documents is not None:
            return AttentionPattern.within(batch.documents, is_causal=True)
        return AttentionPattern.causal(*batch.noised.shape)

    def loss_tokens(self, batch: NoisedBatch) -> Tensor | None:
        """Return the tokens that are predicted, or None for all; see `Objective.loss_tokens`."""
        is_noisy = batch.is_noisy.t()
        return None if bool(is_noisy.all()) else is_noisy.reshape(-1).nonzero().squeeze(-1)

    def loss(self, hidden: Tensor, lm_head_weight: Tensor, batch: DeviceBatch, shard: VocabShard) -> LossOutput:
        """Return loss and terms; `loss`, `elbo` and `kl` are the exact negative log-likelihood in nats."""
        clean = batch.sequences.clean.t()
        process = HybridMixing(self.process.vocab_size, self.process.mask_id, shift=-1000.0)
        noised = torch.full_like(clean, process.mask_id)
        tokens = LossInputs(clean, noised, torch.full_like(clean, _ALL_KEPT, dtype=torch.float32), batch.active_indices)
        output = self.loss_kernel(hidden, lm_head_weight, tokens, LossSpec(process), shard=shard)
        return output._replace(terms=output.terms._replace(elbo=output.terms.kl))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a GPU through pinned memory, without which the host would wait for the copy."""
    if device.type != "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
