"""Replica check: ranks that should hold the same weights are compared bit for bit.

Memory or arithmetic that fails silently makes one replica drift from the others, and nothing else would show it.
Weights stay on their device: each rank reduces its own to one hash a tensor, and only the hashes are compared.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megadiff.errors import TrainingError
from megadiff.model.denoiser import gathered_weights
from megadiff.parallel.pipeline import DataParallelChunk, ModelChunk
from megadiff.parallel.topology import Topology
from megadiff.train.hooks import Hook, Part, StepInfo, named_weights

log = logging.getLogger("megadiff")

_CHUNK = 2**22  # elements hashed at a time: 32 MiB of integers
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_STRIDE = 0x5DEECE66D


def bit_hash(weights: Tensor) -> Tensor:
    """Return a hash of a tensor's exact bits and their positions, an int64 scalar on its device.

    It is the sum over i of (bits of element i) x (an odd number made of i) mod 2^64. As the factors are odd, a change
    of one element always changes it; sums of integers do not depend on their order, so equal bits give equal hashes
    anywhere.
    """
    bits = weights.detach().contiguous().view(-1).view(_BITS[weights.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for first in range(0, bits.numel(), _CHUNK):
        part = bits[first : first + _CHUNK].to(torch.int64)
        place = torch.arange(first, first + part.numel(), device=bits.device)
        place.add_(1).mul_(_STRIDE)
        place.bitwise_xor_(place >> 17).mul_(_STRIDE).bitwise_or_(1)
        total += part.mul_(place).sum()
    return total


class ReplicaCheck(Hook):
    """Comparison of replicated weights every `every` steps (0: never).

    Whole tensors are compared over the data-parallel ranks; those that every tensor-parallel rank holds (norms, biases)
    over these as well. With the distributed optimizer every step distributes each tensor from the one rank that updates
    it: a difference is then younger than the step, and an error in the owner's copy makes no difference.
    """

    section: ClassVar[Part] = "step"
    collectives: ClassVar[bool] = True

    def __init__(
        self, every: int, chunks: Sequence[ModelChunk], wrapped: Sequence[DataParallelChunk], topology: Topology
    ) -> None:
        """Wire the check.

        Args:
            every: number of steps between comparisons.
            chunks: this rank's bare model chunks.
            wrapped: their data-parallel wrappers, whose weights may have to be gathered first.
            topology: this rank's place in the layout.
        """
        self._every, self._wrapped = every, wrapped
        self._weights = named_weights(chunks)
        self._topology = topology
        self._last_equal = "they have not been compared before"

    def __call__(self, info: StepInfo) -> None:
        """Compare if due. Collective over the world.

        Raises:
            TrainingError: some rank's weights differ; on every rank, naming ranks and tensors.
        """
        if not self._every or info.step % self._every:
            return
        with gathered_weights(self._wrapped):
            odd = self._odd_tensors()
        found: list[Any] = [None] * self._topology.layout.world_size
        dist.all_gather_object(found, (socket.gethostname(), odd), group=self._topology.host_group)
        if not any(names for _, names in found):
            self._last_equal = f"they were equal after step {info.step}"
            return
        where = "; ".join(
            f"rank {rank} ({host}) in {_listed(names)}" for rank, (host, names) in enumerate(found) if names
        )
        raise TrainingError(
            f"step {info.step}: ranks that should hold the same weights differ: {where} ({self._last_equal}). Of two "
            "ranks both are named, of more those against the majority. Take the machine out and resume from a "
            "checkpoint of a step at which they were equal"
        )

    def _odd_tensors(self) -> list[str]:
        """Return the names of tensors in which this rank differs from the majority of its replicas."""
        names = list(self._weights)
        hashes = torch.stack([bit_hash(self._weights[name]) for name in names])
        odd = _against_majority(hashes, self._topology.data_group)
        shared = [i for i, name in enumerate(names) if not getattr(self._weights[name], "tensor_model_parallel", False)]
        odd |= {shared[i] for i in _against_majority(hashes[shared], self._topology.tensor_group)}
        return [names[i] for i in sorted(odd)]


def _against_majority(hashes: Tensor, group: ProcessGroup) -> set[int]:
    """Return the positions in `hashes`, [P], at which at least half of the group's ranks differ from this one."""
    ranks = dist.get_world_size(group)
    if ranks == 1 or not hashes.numel():
        return set()
    every = [torch.empty_like(hashes) for _ in range(ranks)]
    dist.all_gather(every, hashes, group=group)
    table = torch.stack(every)
    differing = (table != table[0]).any(dim=0).nonzero().flatten().tolist()
    own = hashes.tolist()
    return {i for i in differing if Counter(table[:, i].tolist())[own[i]] * 2 <= ranks}


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
