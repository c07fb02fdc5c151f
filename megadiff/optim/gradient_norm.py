"""Global gradient norm without a host sync, and clipping to it.

Replaces megatron-core's `clip_grads.py`, which without Transformer Engine and Apex waits for the device once for every
tensor, and scales every tensor through a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_PIECE = 2**16
_NORM_EPS = 1e-6
"""Added to the norm before dividing by it, as torch and megatron-core do."""


def gradient_norm(gradients: Sequence[Tensor], *, group: ProcessGroup | None, device: torch.device) -> Tensor:
    """Return the L2 norm over all ranks of a group, a float64 scalar on the device, without a host sync.

    Collective over the group: one all-reduce, also on a rank without gradients.

    Args:
        gradients: gradients of this rank; each element of the model's gradient is on one rank of the group alone.
        group: None for the whole world.
    """
    squares = torch.zeros((), dtype=torch.float64, device=device)
    if gradients:
        pieces = [piece for gradient in gradients for piece in _pieces(gradient)]
        norms = torch._foreach_norm(pieces, 2, dtype=torch.float32)
        squares = torch.stack(norms).double().square().sum()
    dist.all_reduce(squares, group=group)
    return squares.sqrt()


def clip_grad_norm_(gradients: Sequence[Tensor], limit: float, *, norm: float) -> None:
    """Clip gradients in place to a maximum global norm.

    Args:
        limit: maximum norm, above 0.
        norm: global norm of the model's gradient.
    """
    factor = limit / (norm + _NORM_EPS)
    if gradients and factor < 1.0:
        torch._foreach_mul_(list(gradients), factor)


def _pieces(gradient: Tensor) -> Sequence[Tensor]:
    """Return the pieces over which one float32 sum may run.

    On CPU torch adds up the squares of a tensor one after the other: at 8 million elements the norm is 2e-4 too small,
    and depends on how the layout cuts the tensor. CUDA's kernel adds up pairs.
    """
    return gradient.view(-1).split(_PIECE) if gradient.device.type == "cpu" else (gradient,)
