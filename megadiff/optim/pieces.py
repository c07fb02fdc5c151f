"""The pieces of weights that ranks hold, for optimizers that update a matrix as a whole.

Tensor parallelism cuts a matrix along its rows or its columns. The distributed optimizer flattens what a tensor rank
holds and cuts it again, over data-parallel ranks and wherever their equal shares of a gradient buffer end, so that a
matrix lies whole on one rank or in parts on consecutive ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megadiff.parallel.topology import Topology

PACKED = 3
"""Number of matrices (queries, keys, values) in a packed weight."""


@dataclass(frozen=True)
class Piece:
    """The weight of which a parameter of the optimizer is a piece, and which piece it is."""

    role: str
    """Role of the weight: `hidden` for the blocks' matrices, `embedding`, `head`, `norm` or `bias`."""
    shape: torch.Size
    """Shape of the weight on this tensor rank, of which the parameter has all elements or some."""
    packed_rows: int | None = None
    """Number of rows after which the next of the packed matrices begins; None for a weight that is one matrix."""
    cut_dim: int | None = None
    """Dimension that tensor ranks cut; None if each has the whole weight."""
    tensor_group: ProcessGroup | None = None
    """Ranks that have the other cuts; None where there are none."""
    parts: tuple[tuple[int, range], ...] = ()
    """Rank and flat elements of each part, in order, with the distributed optimizer, whose parameters are flat."""

    @property
    def whole_shape(self) -> tuple[int, int]:
        """Rows and columns of one matrix over all tensor ranks."""
        size = [self.shape[0] // (PACKED if self.packed_rows else 1), self.shape[1]]
        if self.cut_dim is not None and self.tensor_group is not None:
            size[self.cut_dim] *= dist.get_world_size(self.tensor_group)
        return size[0], size[1]

    def matrices(self, weight: Tensor) -> Tensor:
        """Return the matrices of a weight of `shape` [r, c]: [1, r, c], or [3, r / 3, c] of a packed one."""
        rows, columns = self.shape
        if self.packed_rows is None:
            return weight.view(1, rows, columns)
        parts = weight.view(-1, PACKED, self.packed_rows, columns)
        return parts.transpose(0, 1).reshape(PACKED, rows // PACKED, columns)

    def weight(self, matrices: Tensor) -> Tensor:
        """Return the weight [r, c] of its matrices: the inverse of `matrices`."""
        if self.packed_rows is None:
            return matrices.view(self.shape)
        parts = matrices.view(PACKED, -1, self.packed_rows, self.shape[1])
        return parts.transpose(0, 1).reshape(self.shape)

    def own(self, weight: Tensor, rank: int) -> Tensor:
        """Return this rank's part of a weight, in the form of the parameter."""
        if not self.parts:
            return weight
        elements = next(elements for holder, elements in self.parts if holder == rank)
        return weight.reshape(-1)[elements.start : elements.stop]


def piece_of(parameter: Tensor) -> Piece:
    """Return what a parameter that an optimizer was built over is a piece of."""
    return parameter.piece  # type: ignore[attr-defined]


def mark_whole(role: str, parameter: Tensor) -> None:
    """Mark a parameter as the whole of a weight of this role."""
    parameter.piece = Piece(role, parameter.shape, getattr(parameter, "packed_rows", None))  # type: ignore[attr-defined]


def mark_pieces(wrapped: Any, roles: Iterable[tuple[str, torch.nn.Parameter]], topology: Topology) -> None:
    """Mark the parameters of the wrapped optimizer, which may be copies or parts of the model's.

    Args:
        wrapped: megatron-core's wrapper of the optimizer.
        roles: (role, parameter) of the model.
        topology: the run's groups.
    """
    holders = _holders(wrapped, topology) if _is_distributed(wrapped) else {}
    is_cut = topology.layout.tensor > 1
    for role, parameter in roles:
        held = _held(wrapped, parameter)
        if held is None:
            continue
        dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) and is_cut else None  # type: ignore[attr-defined]
        held.piece = Piece(  # type: ignore[attr-defined]
            role,
            parameter.shape,
            getattr(parameter, "packed_rows", None),
            dim,
            topology.tensor_group if dim is not None else None,
            holders.get(parameter, ()),
        )


def gather(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Return the values of whole weights [r, c], given those of the pieces that this rank holds.

    Ranks that hold parts of one weight exchange them; all of them must call this for the same weights in one order.

    Args:
        parameters: parameters of the optimizer.
        values: a tensor of the form of each.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    whole: list[Tensor] = []
    messages: list[dist.P2POp] = []
    for parameter, value in zip(parameters, values, strict=True):
        piece = piece_of(parameter)
        if len(piece.parts) <= 1:
            whole.append(value.view(piece.shape))
            continue
        flat = value.new_empty(piece.shape.numel())
        for holder, elements in piece.parts:
            part = flat[elements.start : elements.stop]
            if holder == rank:
                part.copy_(value)
                others = (other for other, _ in piece.parts if other != rank)
                messages += [dist.P2POp(dist.isend, part, other) for other in others]
            else:
                messages.append(dist.P2POp(dist.irecv, part, holder))
        whole.append(flat.view(piece.shape))
    for work in dist.batch_isend_irecv(messages) if messages else ():
        work.wait()
    return whole


def _is_distributed(wrapped: Any) -> bool:
    return hasattr(wrapped, "gbuf_ranges")


def _held(wrapped: Any, parameter: Any) -> Tensor | None:
    """Return the optimizer's parameter for one of the model's; None if this rank holds no part of it."""
    if _is_distributed(wrapped):
        place = wrapped.model_param_group_index_map.get(parameter)
        return None if place is None else wrapped.optimizer.param_groups[place[0]]["params"][place[1]]
    return getattr(parameter, "main_param", None) if hasattr(wrapped, "float16_groups") else parameter


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
