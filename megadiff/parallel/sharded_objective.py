"""Objectives of a microbatch: from the last stage's hidden states and its sequences to a summed loss and a report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megadiff.diffusion.conditioning import NoisePattern
from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.noising import NoisedBatch
from megadiff.diffusion.objective import SURROGATE, Weighting
from megadiff.diffusion.schedules import LINEAR, LinearSchedule
from megadiff.loss.choice import LossKernel
from megadiff.loss.fused_lm_head import fused_objective
from megadiff.loss.inputs import LossInputs, LossOutput, LossSpec, loss_token_indices
from megadiff.loss.plain_lm_head import plain_objective
from megadiff.loss.vocab_shard import VocabShard
from megadiff.parallel.step_metrics import report_sums
from megadiff.parallel.topology import Topology

_ALL_KEPT = 40.0
"""Log-SNR at which alpha is 1 in float32 and p(lambda) is still far from underflow."""


class DeviceBatch(NamedTuple):
    """A microbatch on its device."""

    sequences: NoisedBatch
    """Sequences on the device, except the prompt lengths, which attention reads on the CPU without a device sync."""
    active_indices: Tensor | None
    """Places, sequence first, of the tokens that can have a loss (`loss_token_indices`)."""


@dataclass(frozen=True)
class ShardedObjective(ABC):
    """The objective to minimise, on this rank's shard of the vocabulary."""

    process: NoiseProcess
    topology: Topology

    @abstractmethod
    def place(self, sequences: NoisedBatch, device: torch.device) -> DeviceBatch:
        """Move a microbatch to the device, after determining on the host which of its tokens count."""

    @abstractmethod
    def lm_head_loss(self, hidden: Tensor, weight: Tensor, placed: DeviceBatch) -> LossOutput:
        """Return summed loss and per-token terms, sequence first.

        Args:
            hidden: [L, b, d], the same on all tensor ranks; its gradient is this rank's part.
            weight: [padded vocabulary / tensor ranks, d], this rank's columns of the head.
            placed: the microbatch.
        """

    def loss(self, output: LossOutput, placed: DeviceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the summed loss over noisy tokens, their number, and the sums of `step_metrics`."""
        sums = report_sums(output.terms, placed.sequences, head_tokens=self.head_tokens(placed))
        return output.loss, placed.sequences.is_noisy.sum().int(), sums

    def head_tokens(self, placed: DeviceBatch) -> int | None:
        """Return the number of a microbatch's tokens whose logits are computed; None for all."""
        return None if placed.active_indices is None else placed.active_indices.numel()

    def _shard(self, weight: Tensor, process: NoiseProcess) -> VocabShard:
        start = self.topology.tensor_rank * weight.shape[0]
        return VocabShard.of(weight, process, start=start, group=self.topology.tensor_group)


@dataclass(frozen=True)
class DiffusionObjective(ShardedObjective):
    """Objective `objective.name: gidd`: the diffusion bound, or its surrogate."""

    weighting: Weighting = SURROGATE
    loss_kernel: LossKernel = fused_objective

    def head_tokens(self, placed: DeviceBatch) -> int | None:
        """Return the same as `ShardedObjective.head_tokens`; the plain head computes all logits."""
        return None if self.loss_kernel is plain_objective else super().head_tokens(placed)

    def place(self, sequences: NoisedBatch, device: torch.device) -> DeviceBatch:
        """See `ShardedObjective.place`."""
        active_indices = loss_token_indices(sequences.noised.t(), sequences.is_noisy.t(), self.process)
        return _placed(sequences, active_indices, device)

    def lm_head_loss(self, hidden: Tensor, weight: Tensor, placed: DeviceBatch) -> LossOutput:
        """Return loss and terms; see `ShardedObjective.lm_head_loss` and `diffusion.objective`."""
        sequences = placed.sequences
        spec = LossSpec(self.process, self.weighting)
        tokens = LossInputs(sequences.clean.t(), sequences.noised.t(), sequences.log_snr.t(), placed.active_indices)
        found = self.loss_kernel(hidden, weight, tokens, spec, shard=self._shard(weight, self.process))
        return found._replace(terms=found.terms._replace(elbo=self._reported_elbo(found.terms.elbo, sequences)))

    def _reported_elbo(self, elbo: Tensor, sequences: NoisedBatch) -> Tensor:
        """Return the bound's integrand [L, b] divided by the density that each token's level was really drawn from.

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
class NextTokenObjective(ShardedObjective):
    """Objective `objective.name: ar`: cross-entropy of the next token over the real tokens, the autoregressive control.

    It is the masked limit of the diffusion loss with everything kept: with z the mask and alpha = 1 the loss is
    w KL = -log p_x, computed by the same sharded code (the mask and padding are excluded in the same way).
    """

    loss_kernel: LossKernel = fused_objective

    def place(self, sequences: NoisedBatch, device: torch.device) -> DeviceBatch:
        """Move a microbatch to the device, in which every token counts; see `ShardedObjective.place`."""
        return _placed(sequences, None, device)

    def lm_head_loss(self, hidden: Tensor, weight: Tensor, placed: DeviceBatch) -> LossOutput:
        """Return loss and terms; `loss`, `elbo` and `kl` are the exact negative log-likelihood in nats."""
        clean = placed.sequences.clean.t()
        process = HybridMixing(self.process.vocab_size, self.process.mask_id, shift=-1000.0)
        tokens = LossInputs(
            clean, torch.full_like(clean, process.mask_id), torch.full(clean.shape, _ALL_KEPT, device=clean.device)
        )
        found = self.loss_kernel(hidden, weight, tokens, LossSpec(process), shard=self._shard(weight, process))
        return found._replace(terms=found.terms._replace(elbo=found.terms.kl))


def _placed(sequences: NoisedBatch, active_indices: Tensor | None, device: torch.device) -> DeviceBatch:
    moved = NoisedBatch(*(_moved(field, device) for field in sequences))
    if active_indices is not None:
        active_indices = _moved(active_indices, device)
    return DeviceBatch(moved._replace(prompt_length=sequences.prompt_length), active_indices)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a GPU through pinned memory, without which the host would wait for the copy."""
    if device.type != "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
