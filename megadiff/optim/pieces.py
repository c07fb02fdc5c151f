"""Parameter groups by role, and the pieces of weights that ranks hold, for optimizers that update a matrix as a whole.

Tensor parallelism cuts a matrix along its rows or its columns. The distributed optimizer flattens what a tensor rank
holds and cuts it again, over data-parallel ranks and wherever their equal shares of a gradient buffer end, so that a
matrix lies whole on one rank or in parts on consecutive ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megadiff.optim.config import OptimizerConfig, Rule, Scale, effective_eps, rules
from megadiff.parallel.topology import Topology

_count: ContextVar[Callable[[Sequence[dist.P2POp]], None] | None] = ContextVar("count", default=None)
"""Function that gets the messages in the place of the other ranks; None where they are sent."""


@dataclass(frozen=True)
class Piece:
    """The weight of which a parameter of the optimizer is a piece, and which piece it is."""

    role: str
    """Role of the weight: `hidden` for the blocks' matrices, `embedding`, `head`, `norm` or `bias`."""
    shape: torch.Size
    """Shape of the weight on this tensor rank, of which the parameter has all elements or some."""
    packed_rows: tuple[int, ...] = ()
    """Rows of each of the matrices that a weight packs, which alternate from its first row to its last: (2, 1) for two
    rows of one matrix, one of another, and so on. Empty for a weight that is one matrix."""
    cut_dim: int | None = None
    """Dimension that tensor ranks cut; None if each has the whole weight."""
    tensor_group: ProcessGroup | None = None
    """Ranks that have the other cuts; None where there are none."""
    parts: tuple[tuple[int, range], ...] = ()
    """Rank and flat elements of each part, in order, with the distributed optimizer, whose parameters are flat."""
    owner: int | None = None
    """Rank among those of `parts` that works on the whole weight; chosen so that all have about equally much to do."""
    data_group: ProcessGroup | None = None
    """Data-parallel ranks, which exchange the parts."""

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """Return the matrices of a weight of `shape` [r, c], stacked where they have one size: each [k, m, c]."""
        rows, columns = self.shape
        if not self.packed_rows:
            return [weight.view(1, rows, columns)]
        repeated = weight.view(-1, sum(self.packed_rows), columns)
        parts = repeated.split(self.packed_rows, dim=1)
        return [
            torch.stack([part.reshape(-1, columns) for part in parts[first : first + count]])
            for first, count in self._equal_runs()
        ]

    def weight(self, matrices: Sequence[Tensor]) -> Tensor:
        """Return the weight [r, c] of its matrices: the inverse of `matrices`."""
        if not self.packed_rows:
            return matrices[0].view(self.shape)
        single = [matrix for stack in matrices for matrix in stack]
        columns = self.shape[1]
        parts = [matrix.view(-1, rows, columns) for matrix, rows in zip(single, self.packed_rows, strict=True)]
        return torch.cat(parts, dim=1).view(self.shape)

    def whole_shape(self, matrices: Tensor) -> tuple[int, int]:
        """Return rows and columns over all tensor ranks of each of the stacked `matrices`."""
        size = [matrices.shape[1], matrices.shape[2]]
        if self.cut_dim is not None and self.tensor_group is not None:
            size[self.cut_dim] *= dist.get_world_size(self.tensor_group)
        return size[0], size[1]

    def _equal_runs(self) -> list[tuple[int, int]]:
        """Return the first index and the length of each run of packed matrices of one size."""
        runs: list[tuple[int, int]] = []
        for _, run in groupby(self.packed_rows):
            runs.append((sum(count for _, count in runs), len(list(run))))
        return runs

    @property
    def is_split(self) -> bool:
        """Whether several data-parallel ranks hold parts of the weight."""
        return len(self.parts) > 1

    def own(self, whole: Tensor, rank: int) -> Tensor:
        """Return the part of a flat whole that a rank holds, as a view."""
        return next(whole[elements.start : elements.stop] for holder, elements in self.parts if holder == rank)

    def with_owner(self, operation: Any, part: Tensor) -> dist.P2POp:
        """Return a message of `dist.isend` or `dist.irecv` from a holder of a part to the owner, or back."""
        assert self.owner is not None
        return dist.P2POp(operation, part, self.owner, self.data_group)

    def with_holders(self, operation: Any, whole: Tensor) -> list[dist.P2POp]:
        """Return the owner's messages to or from the other holders, for their parts of a flat whole."""
        return [
            dist.P2POp(operation, whole[elements.start : elements.stop], holder, self.data_group)
            for holder, elements in self.parts
            if holder != self.owner
        ]


def piece_of(parameter: Tensor) -> Piece:
    """Return what a parameter that an optimizer was built over is a piece of."""
    return parameter.piece  # type: ignore[attr-defined]


def mark_whole(role: str, parameter: Tensor) -> None:
    """Mark a parameter as the whole of a weight of this role."""
    parameter.piece = Piece(role, parameter.shape, getattr(parameter, "packed_rows", ()))  # type: ignore[attr-defined]


def mark_pieces(wrapped: Any, roles: Iterable[tuple[str, torch.nn.Parameter]], topology: Topology) -> None:
    """Mark the parameters of the wrapped optimizer, which may be copies or parts of the model's.

    Args:
        wrapped: megatron-core's wrapper of the optimizer.
        roles: (role, parameter) of the model, in the same order on all ranks of the data group.
        topology: the run's groups.
    """
    holders = _holders(wrapped, topology) if _is_distributed(wrapped) else {}
    is_cut, work, marked = topology.layout.tensor > 1, Counter[int](), set[int]()
    for role, parameter in roles:
        parts = holders.get(parameter, ())
        owner = min((rank for rank, _ in parts), key=lambda rank: work[rank], default=None)
        if owner is not None and role == "hidden":
            work[owner] += parameter.numel()
        held = _held(wrapped, parameter)
        if held is None:
            continue
        marked.add(id(held))
        dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) and is_cut else None  # type: ignore[attr-defined]
        held.piece = Piece(  # type: ignore[attr-defined]
            role,
            parameter.shape,
            getattr(parameter, "packed_rows", ()),
            dim,
            topology.tensor_group if dim is not None else None,
            parts,
            owner,
            topology.data_group,
        )
    for group in wrapped.optimizer.param_groups:
        assert all(id(parameter) in marked for parameter in group["params"]), "a parameter is of no known weight"


def on_owners(
    parameters: Sequence[Tensor], values: Sequence[Tensor], work: Callable[[Piece, Tensor], Tensor]
) -> list[Tensor]:
    """Return the parts, on this rank, of what `work` makes of whole weights.

    The ranks that hold parts of a weight send them to one of them, which works on the whole and sends the results'
    parts back. All of them must call this for the same weights in the same order.

    Args:
        parameters: parameters of the optimizer whose weights are held in several parts.
        values: a flat tensor for each, such as its gradient.
        work: function of a piece and the whole [r, c] that returns a tensor of the same shape and type.
    """
    if not parameters:
        return []
    rank = dist.get_rank()
    wholes: list[Tensor | None] = []
    messages: list[dist.P2POp] = []
    for parameter, value in zip(parameters, values, strict=True):
        piece = piece_of(parameter)
        if piece.owner != rank:
            messages.append(piece.with_owner(dist.isend, value))
            wholes.append(None)
            continue
        whole = value.new_empty(piece.shape.numel())
        piece.own(whole, rank).copy_(value)
        messages += piece.with_holders(dist.irecv, whole)
        wholes.append(whole)
    _exchange(messages)
    results: list[Tensor] = []
    messages = []
    for parameter, value, whole in zip(parameters, values, wholes, strict=True):
        piece = piece_of(parameter)
        if whole is None:
            results.append(torch.empty_like(value))
            messages.append(piece.with_owner(dist.irecv, results[-1]))
            continue
        made = work(piece, whole.view(piece.shape)).reshape(-1)
        results.append(piece.own(made, rank))
        messages += piece.with_holders(dist.isend, made)
    _exchange(messages)
    return results


@contextmanager
def unsent(count: Callable[[Sequence[dist.P2POp]], None]) -> Iterator[None]:
    """Give the messages between holders to `count` inside the block and send none, for ranks that do not exist."""
    token = _count.set(count)
    try:
        yield
    finally:
        _count.reset(token)


def _exchange(messages: Sequence[dist.P2POp]) -> None:
    if (count := _count.get()) is not None:
        count(messages)
        return
    for request in dist.batch_isend_irecv(list(messages)) if messages else ():
        request.wait()


def _is_distributed(wrapped: Any) -> bool:
    return hasattr(wrapped, "gbuf_ranges")


def _held(wrapped: Any, parameter: Any) -> Tensor | None:
    """Return the optimizer's parameter for one of the model's; None if this rank holds no part of it."""
    if _is_distributed(wrapped):
        place = wrapped.model_param_group_index_map.get(parameter)
        return None if place is None else wrapped.optimizer.param_groups[place[0]]["params"][place[1]]
    return getattr(parameter, "main_param", parameter)


def _holders(wrapped: Any, topology: Topology) -> dict[Any, tuple[tuple[int, range], ...]]:
    """Return the parts in which data-parallel ranks hold each weight.

    Each rank has an equal share of every bucket of a gradient buffer (`_build_model_gbuf_range` of megatron-core's
    optimizer/distrib_optimizer.py).
    """
    ranks = dist.get_process_group_ranks(topology.data_group)
    found = {}
    for buffer in wrapped.buffers:
        for parameter, (first, last, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            share = bucket.grad_data.numel() // len(ranks)
            parts = []
            for index, rank in enumerate(ranks):
                start = bucket.offset + index * share
                elements = range(max(first, start) - first, min(last, start + share) - first)
                if len(elements):
                    parts.append((rank, elements))
            found[parameter] = tuple(parts)
    return found


def parameter_groups(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], settings: OptimizerConfig, scale: Scale
) -> list[dict[str, Any]]:
    """Return parameter groups, the same list of groups on every rank even where a group is empty.

    Groups are distinguished by (lr_mult, wd_mult), which is how megatron-core matches them to a checkpoint
    (`param_group_identifier_keys` in optimizer/optimizer.py): roles with equal rules share a group. A group has an
    `eps` if the optimizer has such a setting. Each parameter is marked with its role (`megadiff.optim.pieces`).

    Args:
        parameters: (role, parameter) pairs of this rank.
    """
    table = rules(settings, hidden=scale.hidden)
    by_rule: dict[Rule, list[torch.nn.Parameter]] = {rule: [] for rule in table.values()}
    eps = effective_eps(settings, scale)
    for role, parameter in parameters:
        mark_whole(role, parameter)
        by_rule[table[role]].append(parameter)
    return [
        {
            "params": members,
            "lr": settings.lr * rule.lr_mult,
            "weight_decay": settings.weight_decay * rule.wd_mult,
            **({} if eps is None else {"eps": eps}),
            "lr_mult": rule.lr_mult,
            "wd_mult": rule.wd_mult,
            "is_expert_parallel": False,
            "is_decoupled_lr": False,
        }
        for rule, members in by_rule.items()
    ]
