"""Simple reference for `fused_lm_head`: complete logits, complete rows, the reference objective."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megadiff.diffusion.objective import Terms, gidd_objective
from megadiff.diffusion.shapes import Float
from megadiff.loss.inputs import LossInputs, LossOutput, LossSpec, VocabShard


def plain_objective(
    hidden: Float[Tensor, "... D"],
    weight: Float[Tensor, "V D"],
    tokens: LossInputs,
    spec: LossSpec,
    *,
    shard: VocabShard | None = None,
) -> LossOutput:
    """Compute the same as `fused_lm_head.fused_objective`; every rank of the group makes all the logits' columns.

    About six arrays of [tokens, V] exist at once.
    """
    tokens.check(hidden)
    shard = shard or VocabShard.of(weight, spec.process)
    logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), weight)
    if shard.group is not None:
        logits = _Gathered.apply(logits, shard)
    own = tokens.selected(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    terms = gidd_objective(
        logits if own.active_indices is None else logits[own.active_indices],
        own.clean,
        own.noised,
        own.log_snr,
        mixing=spec.process,
        weighting=spec.weighting,
    )
    return LossOutput(terms.minimised.sum(), Terms(*tokens.scattered(torch.stack(terms).detach()).unbind(0)))


class _Gathered(torch.autograd.Function):
    """All ranks' columns side by side; the backward pass keeps this rank's own, since all compute the same loss."""

    @staticmethod
    def forward(ctx: Any, columns: Float[Tensor, "N local"], shard: VocabShard) -> Float[Tensor, "N V"]:
        parts = [torch.empty_like(columns) for _ in range(torch.distributed.get_world_size(shard.group))]
        torch.distributed.all_gather(parts, columns.contiguous(), group=shard.group)
        ctx.shard = shard
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "N V"]) -> tuple[Float[Tensor, "N local"], None]:
        return grad[:, ctx.shard.start : ctx.shard.start + ctx.shard.width].contiguous(), None
