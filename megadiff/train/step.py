"""One optimizer step: noised microbatches in, sums of per-token terms and the gradient norm out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadiff.diffusion.noising import NoisedRows
from megadiff.model.attention import prompt_code
from megadiff.optim.optimizer import Optimizer
from megadiff.parallel.pipeline import run_microbatches
from megadiff.parallel.row_objective import on_device
from megadiff.parallel.row_report import SIZE
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
    is_causal_prompt: bool = False
    """Whether clean prompts attend causally (a whole row is one under the autoregressive control)."""

    def __call__(self, microbatches: Sequence[NoisedRows], lr: float) -> tuple[Tensor, float]:
        """Forward, backward, reduce, update.

        Args:
            microbatches: this data-parallel rank's, the same on its tensor and pipeline ranks.
            lr: learning rate now.

        Returns:
            Sums over this replica's tokens (`row_report`, float64; zeros except on the last stage), not yet summed over
            replicas, and the global gradient norm. If the norm is not finite nothing was updated.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = run_microbatches(
            self.chunks,
            [on_device(rows, self.device) for rows in microbatches],
            forward=lambda chunk, rows: chunk(
                rows.noised, prompt_code(rows.prompt_length, is_causal=self.is_causal_prompt)
            ),
            loss=self.loss,
            seq_length=self.seq_length,
            micro_sequences=self.micro_sequences,
        )
        sums = torch.stack(reports).sum(0) if reports else torch.zeros(SIZE, dtype=torch.float64)
        return sums.to(self.device), self.optimizer.step(lr)
