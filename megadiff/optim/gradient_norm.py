"""The norm of a whole model's gradient, without asking the device for it, and gradients held to one.

megadiff's stand-in for megatron-core's `clip_grads.py`: without Transformer Engine and Apex, that one waits for the
device once for every tensor, and scales every tensor through a copy of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_PIECE = 2**16
_HELD_BELOW = 1e-6
"""Added to the norm before dividing by it, as torch and megatron-core do."""


def gradient_norm(gradients: Sequence[Tensor], *, group: ProcessGroup | None, device: torch.device) -> Tensor:
    """The L2 norm over all ranks of a group, a float64 scalar on the device; the host does not wait for it.

    Collective over the group: one all-reduce, also on a rank without gradients.

    Args:
        gradients: this rank's, each element of the model's gradient on one rank of the group alone.
        group: None for the whole world.
    """
    squares = torch.zeros((), dtype=torch.float64, device=device)
    if gradients:
        pieces = [piece for gradient in gradients for piece in _pieces(gradient)]
        norms = torch._foreach_norm(pieces, 2, dtype=torch.float32)
        squares = torch.stack(norms).double().square().sum()
    dist.all_reduce(squares, group=group)
    return squares.sqrt()


def hold_to_norm(gradients: Sequence[Tensor], limit: float, *, norm: float) -> None:
    """Scale gradients in place so that a norm above the limit becomes the limit.

    Args:
        limit: largest norm; above 0.
        norm: of the whole model's gradient.
    """
    factor = limit / (norm + _HELD_BELOW)
    if gradients and factor < 1.0:
        torch._foreach_mul_(list(gradients), factor)


def _pieces(gradient: Tensor) -> Sequence[Tensor]:
    """What one float32 sum may run over.

    On CPU torch adds a tensor's squares up one after the other: at 8 million elements the norm is 2e-4 too small, and
    depends on how the layout cuts the tensor. CUDA's kernel adds up pairs.
    """
    return gradient.view(-1).split(_PIECE) if gradient.device.type == "cpu" else (gradient,)
