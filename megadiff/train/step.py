"""One optimizer step: noised microbatches in, sums of per-token terms and the gradient norm out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadiff.diffusion.noising import NoisedRows
from megadiff.optim.optimizer import Optimizer
from megadiff.parallel.pipeline import run_microbatches
from megadiff.parallel.row_objective import SUMS
from megadiff.parallel.topology import Topology


@dataclass(frozen=True)
class Step:
    """Everything one optimizer step needs, wired once."""

    chunks: Sequence[Any]
    """Data-parallel wrapped model chunks of this rank."""
    optimizer: Optimizer
    loss: Callable[[Tensor, NoisedRows], tuple[Tensor, Tensor, Tensor]]
    topology: Topology
    device: torch.device
    seq_length: int
    micro_sequences: int

    def __call__(self, microbatches: Sequence[NoisedRows], lr: float) -> tuple[Tensor, float]:
        """Forward, backward, reduce, update.

        Args:
            microbatches: this data-parallel rank's, the same on its tensor and pipeline ranks.
            lr: learning rate now.

        Returns:
            Sums over this replica's tokens (`SUMS` and the count, float64; zeros except on the last stage), not yet
            summed over replicas, and the global gradient norm. If the norm is not finite nothing was updated.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        on_device = [NoisedRows(*(field.to(self.device, non_blocking=True) for field in rows)) for rows in microbatches]
        reports = run_microbatches(
            self.chunks,
            on_device,
            forward=lambda chunk, rows: chunk(rows.noised),
            loss=self.loss,
            seq_length=self.seq_length,
            micro_sequences=self.micro_sequences,
        )
        sums = torch.stack(reports).sum(0) if reports else torch.zeros(len(SUMS) + 1, dtype=torch.float64)
        return sums.to(self.device), self.optimizer.step(lr)
