"""The objective of a microbatch: from the last stage's logit shards and its noised rows to sums and a loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadiff.diffusion.config import ObjectiveConfig
from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.noising import NoisedRows
from megadiff.diffusion.objective import Terms
from megadiff.diffusion.snr import Rate
from megadiff.parallel.topology import Topology
from megadiff.parallel.vocab_objective import vocab_parallel_objective

SUMS = ("loss", "elbo", "kl", "is", "mean_weight")
"""Order of the sums `RowObjective.loss` reports; the number of noisy tokens follows as the last entry."""


@dataclass(frozen=True)
class RowObjective:
    """The per-token terms of one microbatch on this rank's vocabulary shard."""

    mixing: HybridMixing
    rate: Rate
    settings: ObjectiveConfig
    topology: Topology

    def terms(self, logits: Tensor, rows: NoisedRows) -> Terms:
        """Per-token terms, sequence first: each [L, b]; 0 at noise-free positions.

        Args:
            logits: [L, b, padded vocabulary / tensor ranks] as the last stage returns them; the backward pass writes
                their gradient over them.
            rows: the microbatch, on the logits' device.
        """
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

    def loss(self, logits: Tensor, rows: NoisedRows) -> tuple[Tensor, Tensor, Tensor]:
        """Summed loss over noisy tokens, their number, and the sums to report."""
        terms = self.terms(logits, rows)
        count = rows.is_noisy.sum()
        optimised = terms.elbo if self.settings.weighting == "elbo" else terms.loss
        report = (terms.loss, terms.elbo, terms.weight * terms.kl, terms.weight * terms.is_div, terms.weight)
        sums = [value.detach().double().sum() for value in report]
        return optimised.sum(), count.int(), torch.stack([*sums, count.double()])
