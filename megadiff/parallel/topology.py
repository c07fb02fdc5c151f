"""The process groups of a run: created once, then read from one frozen object; collectives, counted.

This module alone reads megatron-core's `parallel_state`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadiff.parallel.config import Layout
from megadiff.platform.machine import Platform


@dataclass(frozen=True)
class Topology:
    """This rank's position in the layout, and its process groups."""

    layout: Layout
    rank: int
    tensor_rank: int
    stage: int
    """Pipeline stage; stage 0 holds the embedding."""
    data_rank: int
    tensor_group: ProcessGroup
    pipeline_group: ProcessGroup
    data_group: ProcessGroup
    model_group: ProcessGroup
    """Ranks that together hold one replica."""
    host_group: ProcessGroup | None = None
    """All ranks over gloo, for small values on the host; None if the default group already uses gloo."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and logs for the run."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output head, and hence the loss."""
        return self.stage == self.layout.pipeline - 1

    def sum_over_run(self, values: torch.Tensor) -> torch.Tensor:
        """Sum the values on the last stage of every replica; every rank gets the result.

        Collective over the world. Other stages, and tensor ranks other than 0, contribute nothing.
        """
        return self.sum_with_votes(values.flatten(), 0.0)[:-1].view_as(values)

    def sum_with_votes(self, values: torch.Tensor, vote: float) -> torch.Tensor:
        """Return the sums of `sum_over_run` for values [N] and, as the last of [N + 1], the sum of every rank's vote.

        Collective over the world: one all-reduce.
        """
        counted = self.is_last_stage and self.tensor_rank == 0
        total = torch.cat((values if counted else torch.zeros_like(values), values.new_full((1,), vote)))
        if self.layout.world_size > 1:
            dist.all_reduce(total)
        return total

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum the values of all ranks; every rank gets the result. Collective over the world."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    def from_main(self, value: Any) -> Any:
        """Return the main rank's small Python value, on every rank. Collective over the world."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def gather_to_main(self, value: Any) -> list[Any] | None:
        """Gather every rank's small Python value on the main rank, by rank; return None on the others.

        Collective over the world.
        """
        found = [None] * self.layout.world_size if self.is_main else None
        dist.gather_object(value, found, dst=0, group=self.host_group)
        return found

    def largest(self, value: int) -> int:
        """Return the largest of all ranks' integers on every rank, without a device sync. Collective over the world."""
        if self.layout.world_size == 1:
            return value
        held = torch.tensor(value)
        dist.all_reduce(held, dist.ReduceOp.MAX, group=self.host_group)
        return int(held)


def rank_from_environment() -> int:
    """Return this process's rank from torchrun or srun, known before any group is open; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Return whether the launcher made this process rank 0, known before any group is open."""
    return rank_from_environment() == 0


def world_size_from_environment() -> int:
    """Return the number of ranks that torchrun or srun started; 1 without a launcher."""
    return launched_world_size() or 1


def launched_world_size() -> int | None:
    """Return the number of ranks that torchrun or srun started; None without a launcher."""
    found = os.environ.get("WORLD_SIZE")
    return None if found is None else int(found)


@contextmanager
def process_group(platform: Platform, *, alone: bool = False, timeout_s: float = 1800.0) -> Iterator[None]:
    """Open torch.distributed's default group for this process and close it at the end.

    Without a launcher, or `alone`, the group has one rank and needs no port.
    """
    if not alone and "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(platform.backend, timeout=timedelta(seconds=timeout_s))
    else:
        dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    except BaseException:
        # Destroying an NCCL group flushes it, waiting for peers that may be gone, so a failing rank skips it.
        if dist.is_initialized() and (dist.get_world_size() == 1 or dist.get_backend() == "gloo"):
            _close_groups()
        raise
    if dist.is_initialized():
        _close_groups()


@contextmanager
def imagined_process_group(rank: int, world_size: int) -> Iterator[None]:
    """Open a default group in which this process is one of `world_size` ranks and the others do not exist.

    Collectives return at once and communicate nothing.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        _close_groups()


def _close_groups() -> None:
    """Close the default group and let go of megatron-core's, which would keep their sockets open in a later run."""
    dist.destroy_process_group()
    state: Any = importlib.import_module("megatron.core.parallel_state")
    state.destroy_model_parallel()


def open_topology(layout: Layout, *, timeout_s: float = 1800.0) -> Topology:
    """Build megatron-core's groups for `layout` on the open default group. Collective over the world.

    Args:
        layout: the layout.
        timeout_s: seconds that a rank waits for the others over the host's network.
    """
    state: Any = importlib.import_module("megatron.core.parallel_state")

    if state.model_parallel_is_initialized():
        state.destroy_model_parallel()
    state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        create_gloo_process_groups=False,
    )
    return Topology(
        layout=layout,
        rank=dist.get_rank(),
        tensor_rank=state.get_tensor_model_parallel_rank(),
        stage=state.get_pipeline_model_parallel_rank(),
        data_rank=state.get_data_parallel_rank(),
        tensor_group=state.get_tensor_model_parallel_group(),
        pipeline_group=state.get_pipeline_model_parallel_group(),
        data_group=state.get_data_parallel_group(with_context_parallel=True),
        model_group=state.get_model_parallel_group(),
        host_group=None if dist.get_backend() in ("gloo", "fake") else _open_host_group(timeout_s),
    )


def _open_host_group(timeout_s: float) -> ProcessGroup:
    return cast(ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)))


class Collectives(TorchDispatchMode):
    """Counts the collectives inside it, of a group or of all, and the bytes of the larger side of each."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self._name = None if group is None else group.group_name
        self.calls = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and self._name in (None, *_groups_in(args)):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.calls += 1
            self.bytes += max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
        return func(*args, **(kwargs or {}))


def _groups_in(args: Any) -> list[str]:
    """Return the names of the process groups among the arguments of a collective."""
    boxed = (leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.ScriptObject))
    return [dist.ProcessGroup.unbox(leaf).group_name for leaf in boxed if "ProcessGroup" in str(leaf._type())]
