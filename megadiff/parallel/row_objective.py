"""Objectives of a microbatch: from the last stage's logit shards and its rows to a summed loss and a report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from megadiff.diffusion.config import ObjectiveConfig
from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.mixing_base import Mixing
from megadiff.diffusion.noising import NoisedRows
from megadiff.diffusion.objective import Terms
from megadiff.diffusion.snr import Rate
from megadiff.parallel.row_report import report_sums
from megadiff.parallel.topology import Topology
from megadiff.parallel.vocab_objective import vocab_parallel_objective

_ALL_KEPT = 40.0
"""A log-SNR at which alpha is 1 in float32 and p(lambda) is still far from underflow."""


@dataclass(frozen=True)
class RowObjective(ABC):
    """Per-token terms on this rank's vocabulary shard."""

    mixing: Mixing
    topology: Topology

    @abstractmethod
    def terms(self, logits: Tensor, rows: NoisedRows) -> Terms:
        """Per-token terms, sequence first: each [L, b]; 0 at noise-free positions. `loss` carries the gradient.

        Args:
            logits: [L, b, padded vocabulary / tensor ranks] as the last stage returns them; the backward pass writes
                their gradient over them.
            rows: the microbatch, on the logits' device.
        """

    def loss(self, logits: Tensor, rows: NoisedRows) -> tuple[Tensor, Tensor, Tensor]:
        """Summed loss over noisy tokens, their number, and the sums of `row_report`."""
        terms = self.terms(logits, rows)
        return self.optimised(terms).sum(), rows.is_noisy.sum().int(), report_sums(terms, rows)

    def optimised(self, terms: Terms) -> Tensor:
        """The term that carries the gradient."""
        return terms.loss


@dataclass(frozen=True)
class DiffusionObjective(RowObjective):
    """`objective.name: gidd`: the diffusion bound, or its surrogate."""

    rate: Rate
    settings: ObjectiveConfig

    def terms(self, logits: Tensor, rows: NoisedRows) -> Terms:
        """See `RowObjective.terms` and `diffusion.objective`."""
        return vocab_parallel_objective(
            logits,
            rows.clean.t(),
            rows.noised.t(),
            rows.log_snr.t(),
            mixing=self.mixing,
            rate=self.rate,
            is_weight=self.settings.is_weight,
            group=self.topology.tensor_group,
            vocab_start=self.topology.tensor_rank * logits.shape[-1],
            needed=rows.is_noisy.t(),
            weighting=self.settings.weighting,
            overwrite_logits=True,
        )

    def optimised(self, terms: Terms) -> Tensor:
        """`loss`, or `elbo` under `weighting: elbo`."""
        return terms.elbo if self.settings.weighting == "elbo" else terms.loss


@dataclass(frozen=True)
class NextTokenObjective(RowObjective):
    """`objective.name: ar`: cross-entropy of the next token over the real tokens, the autoregressive control.

    It is the masked limit of the diffusion loss where everything is kept: with z the mask and alpha = 1 the loss is
    w KL = -log p_x, computed by the same sharded code (the mask and padding excluded alike).
    """

    def terms(self, logits: Tensor, rows: NoisedRows) -> Terms:
        """`loss`, `elbo` and `kl` are the negative log-likelihood in nats, exact; see `RowObjective.terms`."""
        found = vocab_parallel_objective(
            logits,
            rows.clean.t(),
            torch.full_like(rows.clean.t(), self.mixing.mask_id),
            torch.full_like(rows.log_snr.t(), _ALL_KEPT),
            mixing=HybridMixing(self.mixing.vocab_size, self.mixing.mask_id, shift=-1000.0),
            group=self.topology.tensor_group,
            vocab_start=self.topology.tensor_rank * logits.shape[-1],
            overwrite_logits=True,
        )
        return found._replace(elbo=found.kl)


def on_device(rows: NoisedRows, device: torch.device) -> NoisedRows:
    """The rows on `device`, but for the prompt lengths, which attention reads on the CPU without waiting for it."""
    moved = NoisedRows(*(field.to(device, non_blocking=True) for field in rows))
    return moved._replace(prompt_length=rows.prompt_length)
