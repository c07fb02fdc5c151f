"""One optimizer step, from noised microbatches to sums of per-token terms, the gradient norm and the decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megadiff.diffusion.noising import NoisedBatch
from megadiff.loss.inputs import LossOutput
from megadiff.optim.optimizer import Optimizer
from megadiff.parallel.objective import DeviceBatch, ShardedObjective
from megadiff.parallel.pipeline import DataParallelChunk, run_microbatches
from megadiff.parallel.step_metrics import SIZE, mean_loss
from megadiff.parallel.topology import Topology
from megadiff.train.health import NonFiniteSource, StepDecision, non_finite_sources


class StepOutput(NamedTuple):
    """The result of one optimizer step."""

    sums: Tensor
    """Sums over the tokens of the whole batch (`step_metrics`), [SIZE] float64 on the device, the same on every
    rank."""
    grad_norm: float
    """Norm of the whole model's gradient before clipping."""
    decision: StepDecision
    """Decision about the update; the same on every rank."""
    sources: tuple[NonFiniteSource, ...] = ()
    """Ranks, samples and tensors that were not finite."""
    is_stop_requested: bool = False
    """Whether some rank was requested to stop; the same on every rank."""


@dataclass(frozen=True)
class TrainStep:
    """The parts of an optimizer step; a call takes one."""

    chunks: Sequence[DataParallelChunk]
    """Data-parallel wrapped model chunks of this rank."""
    optimizer: Optimizer
    objective: ShardedObjective
    topology: Topology
    device: torch.device
    seq_length: int
    micro_batch_size: int
    check: Callable[[float, float], StepDecision]
    """Function from loss and gradient norm, both of the whole batch, to the decision about the update, which must be
    the same on every rank."""

    def __call__(
        self,
        microbatches: Sequence[NoisedBatch],
        lr: float,
        *,
        mark: Callable[[str], None] = lambda _: None,
        is_stop_requested: Callable[[], bool] = lambda: False,
    ) -> StepOutput:
        """Run forward and backward, reduce, check the figures, and update the weights.

        Args:
            microbatches: this data-parallel rank's microbatches, the same on its tensor and pipeline ranks.
            lr: learning rate of the step.
            mark: called with the name of each part of the step as it begins, in the same order on every rank.
            is_stop_requested: called after the backward pass; whether this rank was requested to stop. The answers
                travel with the sums, so ranks agree to stop without a collective of their own.
        """
        mark("forward and backward")
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        found = run_microbatches(
            self.chunks,
            [self.objective.place(sequences, self.device) for sequences in microbatches],
            forward=self.objective.forward,
            loss=self._gated_loss,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
        )
        mark("update")
        reports = torch.stack(found) if found else torch.zeros(0, SIZE, dtype=torch.float64, device=self.device)
        total = self.topology.sum_with_votes(reports.sum(0), float(is_stop_requested()))
        sums = total[:SIZE]
        # The host waits for the device only here.
        figures = torch.stack((mean_loss(sums), self.optimizer.gradient_norm(), total[SIZE]))
        loss, grad_norm, requests = figures.tolist()
        decision = self.check(loss, grad_norm)
        sources: tuple[NonFiniteSource, ...] = ()
        if decision.skip is None:
            self.optimizer.step(lr, norm=grad_norm)
        elif decision.skip == "non_finite":
            sources = non_finite_sources(reports, self.chunks, self.topology, micro_batch_size=self.micro_batch_size)
        return StepOutput(sums, grad_norm, decision, sources, is_stop_requested=requests > 0)

    def _gated_loss(self, output: LossOutput, placed: DeviceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss with its gradient multiplied by 1 if the loss is finite and by NaN if not.

        Only the first tensor-parallel rank's report is counted. A loss that is not finite on another one makes the
        gradient norm not finite on every rank, without a host sync, even if its own derivative is finite.
        """
        loss, tokens, report = self.objective.report(output, placed)
        return loss * (1.0 + 0.0 * loss.detach()), tokens, report
