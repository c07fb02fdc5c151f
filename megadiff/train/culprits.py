"""Which rank, samples and tensors made a step not finite: asked only once it is known that something did."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadiff.data.loader import microbatch_samples
from megadiff.parallel.pipeline import DataParallelChunk
from megadiff.parallel.row_report import has_finite_loss
from megadiff.parallel.topology import Topology


@dataclass(frozen=True)
class Culprit:
    """What one rank found."""

    rank: int
    host: str
    stage: int
    samples: tuple[int, ...]
    """Of the microbatches whose loss is not finite, counted from the step's first sample; empty on most ranks."""
    tensors: tuple[str, ...]
    """Parameters whose gradient is not finite, in the order of the model."""

    @property
    def described_place(self) -> str:
        """The rank and its machine."""
        return f"rank {self.rank} ({self.host})"

    def describe(self, first_sample: int) -> str:
        """In words; `first_sample` is the step's."""
        if self.samples:
            named = ", ".join(str(first_sample + sample) for sample in self.samples)
            return f"loss of a microbatch on {self.described_place}, samples {named}"
        count = f"{len(self.tensors)} tensor(s), nearest the output {self.tensors[-1]}"
        return f"gradient on {self.described_place}, stage {self.stage}: {count}"


def find_culprits(
    reports: Tensor, chunks: Sequence[DataParallelChunk], topology: Topology, *, micro_sequences: int
) -> tuple[Culprit, ...]:
    """Ask every rank what it holds that is not finite. Collective over the world.

    Where a loss is, its rank and samples are the answer (of the tensor ranks that share it, the lowest). Where all
    losses are finite, gradients are asked; these are reduced over replicas by now, so of the ranks that share a part of
    the model the lowest stands for all, and only the stage nearest the output is named: what is not finite there
    spreads to every stage before it.

    Args:
        reports: [M, SIZE] of this rank's microbatches; no rows except on the last stage.
        chunks: data-parallel wrapped model chunks.
    """
    found: list[Any] = [None] * topology.layout.world_size
    dist.all_gather_object(found, _own(reports, chunks, topology, micro_sequences), group=topology.host_group)
    by_loss = {culprit.samples: culprit for culprit in reversed(found) if culprit.samples}
    if by_loss:
        return tuple(sorted(by_loss.values(), key=lambda culprit: culprit.rank))
    by_gradient = [culprit for culprit in found if culprit.tensors]
    last = max((culprit.stage for culprit in by_gradient), default=0)
    return tuple(culprit for culprit in by_gradient if culprit.stage == last)[:1]


def _own(reports: Tensor, chunks: Sequence[DataParallelChunk], topology: Topology, micro_sequences: int) -> Culprit:
    samples: list[int] = []
    if topology.is_last_stage:
        for microbatch in (~has_finite_loss(reports)).nonzero().flatten().tolist():
            samples += microbatch_samples(
                0,
                micro_sequences=micro_sequences,
                dp_rank=topology.data_rank,
                dp_size=topology.layout.data,
                microbatch=microbatch,
            )
    tensors = [
        re.sub(r"^(module\.)+", "", name)  # the wrappers' own
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if not bool(torch.isfinite(parameter.main_grad).all())  # type: ignore[attr-defined]
    ]
    return Culprit(topology.rank, socket.gethostname(), topology.stage, tuple(samples), tuple(tensors))
