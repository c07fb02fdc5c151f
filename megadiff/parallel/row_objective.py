"""Objectives of a microbatch: from the last stage's hidden states and its rows to a summed loss and a report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megadiff.diffusion.conditioning import NoisePattern
from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.noising import NoisedRows
from megadiff.diffusion.objective import SURROGATE, Weighting
from megadiff.diffusion.schedules import LINEAR, LinearSchedule
from megadiff.kernels.choice import Head
from megadiff.kernels.fused_head import fused_objective
from megadiff.kernels.head import Formula, HeadLoss, HeadTokens, worth_computing
from megadiff.kernels.plain_head import plain_objective
from megadiff.kernels.vocab_shard import VocabShard
from megadiff.parallel.row_report import report_sums
from megadiff.parallel.topology import Topology

_ALL_KEPT = 40.0
"""Log-SNR at which alpha is 1 in float32 and p(lambda) is still far from underflow."""


class PlacedRows(NamedTuple):
    """A microbatch on its device."""

    rows: NoisedRows
    """Rows on the device, except the prompt lengths, which attention reads on the CPU without a device sync."""
    computed: Tensor | None
    """Places, sequence first, of the tokens that can have a loss (`worth_computing`)."""


@dataclass(frozen=True)
class RowObjective(ABC):
    """The objective to minimise, on this rank's shard of the vocabulary."""

    process: NoiseProcess
    topology: Topology

    @abstractmethod
    def place(self, rows: NoisedRows, device: torch.device) -> PlacedRows:
        """Move a microbatch to the device, after determining on the host which of its tokens count."""

    @abstractmethod
    def lm_head_loss(self, hidden: Tensor, weight: Tensor, placed: PlacedRows) -> HeadLoss:
        """Return summed loss and per-token terms, sequence first.

        Args:
            hidden: [L, b, d], the same on all tensor ranks; its gradient is this rank's part.
            weight: [padded vocabulary / tensor ranks, d], this rank's columns of the head.
            placed: the microbatch.
        """

    def loss(self, answer: HeadLoss, placed: PlacedRows) -> tuple[Tensor, Tensor, Tensor]:
        """Return the summed loss over noisy tokens, their number, and the sums of `row_report`."""
        sums = report_sums(answer.terms, placed.rows, head_tokens=self.head_tokens(placed))
        return answer.loss, placed.rows.is_noisy.sum().int(), sums

    def head_tokens(self, placed: PlacedRows) -> int | None:
        """Return the number of a microbatch's tokens whose logits are computed; None for all."""
        return None if placed.computed is None else placed.computed.numel()

    def _shard(self, weight: Tensor, process: NoiseProcess) -> VocabShard:
        start = self.topology.tensor_rank * weight.shape[0]
        return VocabShard.of(weight, process, start=start, group=self.topology.tensor_group)


@dataclass(frozen=True)
class DiffusionObjective(RowObjective):
    """Objective `objective.name: gidd`: the diffusion bound, or its surrogate."""

    weighting: Weighting = SURROGATE
    head: Head = fused_objective

    def head_tokens(self, placed: PlacedRows) -> int | None:
        """Return the same as `RowObjective.head_tokens`; the plain head computes all logits."""
        return None if self.head is plain_objective else super().head_tokens(placed)

    def place(self, rows: NoisedRows, device: torch.device) -> PlacedRows:
        """See `RowObjective.place`."""
        computed = worth_computing(rows.noised.t(), rows.is_noisy.t(), self.process)
        return _placed(rows, computed, device)

    def lm_head_loss(self, hidden: Tensor, weight: Tensor, placed: PlacedRows) -> HeadLoss:
        """Return loss and terms; see `RowObjective.lm_head_loss` and `diffusion.objective`."""
        rows = placed.rows
        formula = Formula(self.process, self.weighting)
        tokens = HeadTokens(rows.clean.t(), rows.noised.t(), rows.log_snr.t(), placed.computed)
        found = self.head(hidden, weight, tokens, formula, shard=self._shard(weight, self.process))
        return found._replace(terms=found.terms._replace(elbo=self._reported_elbo(found.terms.elbo, rows)))

    def _reported_elbo(self, elbo: Tensor, rows: NoisedRows) -> Tensor:
        """Return the bound's integrand [L, b] divided by the density that each token's level was really drawn from.

        The result has one definition for every schedule (`NoiseSchedule.reporting_density`). Sequences of
        `NoisePattern.LINEAR` follow the linear schedule whatever the others do, so their tokens are divided by
        its density.
        """
        schedule = self.process.schedule
        if isinstance(schedule, LinearSchedule):
            return elbo
        log_snr = rows.log_snr.t()
        is_linear = rows.levels == NoisePattern.LINEAR
        drawn = torch.where(is_linear, LINEAR.density(log_snr), schedule.reporting_density(log_snr))
        return elbo * (schedule.density(log_snr) / drawn)


@dataclass(frozen=True)
class NextTokenObjective(RowObjective):
    """Objective `objective.name: ar`: cross-entropy of the next token over the real tokens, the autoregressive control.

    It is the masked limit of the diffusion loss with everything kept: with z the mask and alpha = 1 the loss is
    w KL = -log p_x, computed by the same sharded code (the mask and padding are excluded in the same way).
    """

    head: Head = fused_objective

    def place(self, rows: NoisedRows, device: torch.device) -> PlacedRows:
        """Move a microbatch to the device, in which every token counts; see `RowObjective.place`."""
        return _placed(rows, None, device)

    def lm_head_loss(self, hidden: Tensor, weight: Tensor, placed: PlacedRows) -> HeadLoss:
        """Return loss and terms; `loss`, `elbo` and `kl` are the exact negative log-likelihood in nats."""
        clean = placed.rows.clean.t()
        process = HybridMixing(self.process.vocab_size, self.process.mask_id, shift=-1000.0)
        tokens = HeadTokens(
            clean, torch.full_like(clean, process.mask_id), torch.full(clean.shape, _ALL_KEPT, device=clean.device)
        )
        found = self.head(hidden, weight, tokens, Formula(process), shard=self._shard(weight, process))
        return found._replace(terms=found.terms._replace(elbo=found.terms.kl))


def _placed(rows: NoisedRows, computed: Tensor | None, device: torch.device) -> PlacedRows:
    moved = NoisedRows(*(_moved(field, device) for field in rows))
    if computed is not None:
        computed = _moved(computed, device)
    return PlacedRows(moved._replace(prompt_length=rows.prompt_length), computed)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a GPU through pinned memory, without which the host would wait for the copy."""
    if device.type != "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
