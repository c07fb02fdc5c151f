"""One optimizer step: noised microbatches in; sums of per-token terms, the gradient norm and what was decided out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadiff.diffusion.noising import NoisedRows
from megadiff.kernels.head import HeadLoss
from megadiff.model.attention import prompt_code
from megadiff.optim.optimizer import Optimizer
from megadiff.parallel.pipeline import DataParallelChunk, ModelChunk, run_microbatches
from megadiff.parallel.row_objective import PlacedRows, RowObjective
from megadiff.parallel.row_report import SIZE, mean_loss
from megadiff.parallel.topology import Topology
from megadiff.train.culprits import Culprit, find_culprits
from megadiff.train.health import Verdict


class Taken(NamedTuple):
    """What a step tells."""

    total: Tensor
    """Sums over the tokens of the whole batch (`row_report`), [SIZE] float64 on the device, the same on every rank."""
    grad_norm: float
    """Of the whole model, before clipping."""
    verdict: Verdict
    culprits: tuple[Culprit, ...] = ()
    """Where something was not finite."""


@dataclass(frozen=True)
class Step:
    """Everything one optimizer step needs, wired once."""

    chunks: Sequence[DataParallelChunk]
    """Data-parallel wrapped model chunks of this rank."""
    optimizer: Optimizer
    objective: RowObjective
    topology: Topology
    device: torch.device
    seq_length: int
    micro_sequences: int
    judge: Callable[[float, float], Verdict]
    """(loss, gradient norm), both of the whole batch -> whether the update is made; the same answer on every rank."""
    is_causal_prompt: bool = False
    """Whether clean prompts attend causally (a whole row is one under the autoregressive control)."""

    def __call__(
        self, microbatches: Sequence[NoisedRows], lr: float, *, mark: Callable[[str], None] = lambda _: None
    ) -> Taken:
        """Forward, backward, reduce, judge, update.

        Args:
            microbatches: this data-parallel rank's, the same on its tensor and pipeline ranks.
            lr: learning rate now.
            mark: told each part of the step as it begins, in the same order on every rank.
        """
        mark("forward and backward")
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        found = run_microbatches(
            self.chunks,
            [self.objective.place(rows, self.device) for rows in microbatches],
            forward=self._forward,
            loss=self._gated_loss,
            seq_length=self.seq_length,
            micro_sequences=self.micro_sequences,
        )
        mark("update")
        reports = torch.stack(found) if found else torch.zeros(0, SIZE, dtype=torch.float64, device=self.device)
        total = self.topology.sum_over_run(reports.sum(0))
        # The one time in a step that the host waits for the device.
        loss, grad_norm = torch.stack((mean_loss(total), self.optimizer.gradient_norm())).tolist()
        verdict = self.judge(loss, grad_norm)
        culprits: tuple[Culprit, ...] = ()
        if verdict.skip is None:
            self.optimizer.step(lr, norm=grad_norm)
        elif verdict.skip == "non_finite":
            culprits = find_culprits(reports, self.chunks, self.topology, micro_sequences=self.micro_sequences)
        return Taken(total, grad_norm, verdict, culprits)

    def _forward(self, chunk: ModelChunk, placed: PlacedRows) -> Any:
        rows = placed.rows
        return chunk(
            rows.noised,
            prompt_code(rows.prompt_length, is_causal=self.is_causal_prompt),
            loss_fn=lambda hidden, weight: self.objective.lm_head_loss(hidden, weight, placed),
        )

    def _gated_loss(self, answer: HeadLoss, placed: PlacedRows) -> tuple[Tensor, Tensor, Tensor]:
        """The loss with its gradient times 1 where it is finite and times NaN where not.

        Of tensor-parallel ranks only the first one's report is counted. So that a loss that went wrong on another is
        not missed, it makes the gradient norm not finite, on every rank and without asking the host, even where its
        own derivative came out finite.
        """
        loss, tokens, report = self.objective.loss(answer, placed)
        return loss * (1.0 + 0.0 * loss.detach()), tokens, report
