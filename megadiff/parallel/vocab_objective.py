"""The objective on vocabulary shards, in chunks of tokens: `diffusion.objective` without a full row of logits anywhere.

Every rank of a group holds some columns of the logits. What a token's objective needs of the vocabulary
(`VocabularySums`) is made of sums of per-rank parts, so three small all-reduces a chunk make them whole:

    MAX   the row's maximum                                        4 bytes a token
    SUM   Z' = sum over real v != x of e_v, and the logits at x, z     12 bytes
    SUM   T = sum of log1p(rho p_v), A = sum of rho p_v / (1 + rho p_v)    8 bytes (not under masked noise)

The backward pass needs no communication: each rank turns the gradients of those numbers into those of its own
columns, recomputing a chunk at a time from the logits and a few numbers a token. No [tokens, vocabulary] array but the
logits and their gradient is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadiff.diffusion.config import Weighting
from megadiff.diffusion.mixing_base import Mixing
from megadiff.diffusion.objective import (
    LOG_RHO_LIMIT,
    OPTIMISED,
    Terms,
    VocabularySums,
    check_token_shapes,
    log1p_exp,
    terms_from_sums,
)
from megadiff.diffusion.snr import LINEAR, Rate


def vocab_parallel_objective(
    logits_shard: Tensor,
    clean: Tensor,
    noised: Tensor,
    log_snr: Tensor,
    *,
    mixing: Mixing,
    rate: Rate = LINEAR,
    is_weight: float = 1.0,
    group: torch.distributed.ProcessGroup | None = None,
    vocab_start: int = 0,
    chunk_tokens: int = 256,
    needed: Tensor | None = None,
    weighting: Weighting = "surrogate",
    overwrite_logits: bool = False,
) -> Terms:
    """`gidd_objective` for logits of which this rank holds the columns [vocab_start, vocab_start + V / tp).

    Args:
        logits_shard: [..., V / tp] (any leading axes, flattened to T tokens), any float dtype; computed in float32
            (float64 if given so). Columns of the mask and from `mixing.vocab_size` on get no probability, no gradient.
        clean, noised, log_snr: [...] the same on every rank of the group.
        mixing, rate, is_weight: as for `gidd_objective`.
        group: the ranks that share the vocabulary; None or a group of one communicates nothing.
        vocab_start: global id of this rank's first column.
        chunk_tokens: tokens worked on at a time; memory beyond the logits and their gradient grows with this alone.
        needed: [...] bool, tokens that count, the same on every rank; the rest give 0 everywhere and are not computed.
            Under masked noise only masks are computed either way (any other token has weight 0).
        weighting: which term carries the gradient, `elbo` or `loss` (surrogate, or dynamic: with those weights in it);
            all others come detached.
        overwrite_logits: let the backward pass write the gradient into the logits' own memory. Only for logits nobody
            reads again.

    Returns:
        Terms of [...], float32, the same on every rank. A token that was not computed has 0 in every field.

    Raises:
        ValueError: shapes that do not agree, a chunk below 1, no such weighting.
        ConfigError: dynamic weights where the noise has none.
    """
    _check(logits_shard, clean, noised, log_snr, needed, chunk_tokens)
    shape, dtype = clean.shape, torch.float64 if logits_shard.dtype == torch.float64 else torch.float32
    x, z, level = clean.reshape(-1), noised.reshape(-1), log_snr.reshape(-1).to(dtype)
    computed = _computed(z, mixing, None if needed is None else needed.reshape(-1))
    if computed is not None:
        x, z, level = x[computed], z[computed], level[computed]
    tokens = _Tokens(x, z, level, rho=torch.exp(mixing.log_rho(level).clamp(max=LOG_RHO_LIMIT)))
    if group is not None and torch.distributed.get_world_size(group) == 1:
        group = None
    shard = _Shard(group, vocab_start, mixing, chunk_tokens, computed, overwrite_logits)
    sums = _ShardedSums.apply(logits_shard.reshape(-1, logits_shard.shape[-1]), tokens, shard)
    terms = terms_from_sums(
        VocabularySums(*sums[:2], log1p_sum=None if mixing.is_masked_limit else sums[2]),
        tokens.clean,
        tokens.noised,
        tokens.log_snr,
        mixing=mixing,
        is_weight=is_weight,
        rate=rate,
        weighting=weighting,
    )
    terms = Terms(*(t if name == OPTIMISED[weighting] else t.detach() for name, t in terms._asdict().items()))
    return Terms(*(_scatter(term, computed, shape) for term in terms))


@dataclass(frozen=True)
class _Tokens:
    """Ids and levels of the tokens computed, each [n], and rho with its logarithm held to LOG_RHO_LIMIT."""

    clean: Tensor
    noised: Tensor
    log_snr: Tensor
    rho: Tensor


@dataclass(frozen=True)
class _Shard:
    """Which part of the logits matrix is this rank's work, and how it is done."""

    group: torch.distributed.ProcessGroup | None
    vocab_start: int
    mixing: Mixing
    chunk_tokens: int
    computed: Tensor | None
    """Rows of the logits to compute, [n]; None for all of them."""
    overwrite_logits: bool

    def chunks(self, num_tokens: int) -> list[slice]:
        return [slice(i, min(i + self.chunk_tokens, num_tokens)) for i in range(0, num_tokens, self.chunk_tokens)]

    def real_columns(self, width: int) -> int:
        """How many of this rank's columns are vocabulary rather than padding."""
        return max(0, min(width, self.mixing.vocab_size - self.vocab_start))

    def rows(self, part: slice) -> slice | Tensor:
        return part if self.computed is None else self.computed[part]

    def place(self, ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """(column [n, 1], here [n, 1]): where each id stands on this rank, and whether it does and is a real token."""
        column = (ids - self.vocab_start).unsqueeze(-1)
        real = self.real_columns(width)
        here = (column >= 0) & (column < real) & (ids != self.mixing.mask_id).unsqueeze(-1)
        return column.clamp(0, max(0, real - 1)), here

    def read(self, logits: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
        """A fresh copy of the chunk's real columns, with -inf at the mask; one column of -inf where none is real."""
        real = self.real_columns(logits.shape[-1])
        values = logits[self.rows(part), : max(1, real)].to(dtype, copy=True)
        mask_column = self.mixing.mask_id - self.vocab_start
        if real == 0:
            values.fill_(-torch.inf)
        elif 0 <= mask_column < real:
            values[:, mask_column] = -torch.inf
        return values

    def reduce(self, *values: Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> tuple[Tensor, ...]:
        """Combine per-token values over the group, in one collective."""
        if self.group is None:
            return values
        packed = torch.stack(values)
        torch.distributed.all_reduce(packed, op=op, group=self.group)
        return packed.unbind(0)


class _ShardedSums(torch.autograd.Function):
    """Logits [T, V / tp] -> log odds, log p_z, T, each [n] (`VocabularySums`); the gradient is worked out by hand.

    With s_j = y_j / (1 + y_j), A = sum over v != x of s_v and g the incoming gradients, for real j

        j != x    e_j (g_odds / Z' - (g_z + g_T A) / Z) + g_T s_j + g_z 1[j = z]
        j  = x    -g_odds + g_z 1[x = z] - (g_z + g_T A) e_x / Z
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: _Tokens, shard: _Shard) -> tuple[Tensor, ...]:
        """Three passes over each chunk, of which two are over numbers already in the cache."""
        scratch = [_chunk_sums(logits, tokens, shard, part) for part in shard.chunks(len(tokens.clean))]
        empty = tokens.log_snr.new_zeros(6, 0)
        saved = torch.cat([*scratch, empty], dim=1)
        ctx.save_for_backward(logits, saved)
        ctx.tokens, ctx.shard = tokens, shard
        _, other, at_clean, at_noised, log1p_sum, _ = saved
        log_odds = torch.log(other.clamp(min=torch.finfo(other.dtype).tiny)) - at_clean
        return log_odds, at_noised - at_clean - log1p_exp(log_odds), log1p_sum.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Each rank fills its own columns, a chunk at a time."""
        logits, saved = ctx.saved_tensors
        tokens, shard = ctx.tokens, ctx.shard
        out = _gradient_buffer(logits, shard)
        for part in shard.chunks(len(tokens.clean)):
            grad = _chunk_gradient(logits, tokens, shard, part, saved[:, part], [g[part] for g in grads])
            out[shard.rows(part), : grad.shape[-1]] = grad.to(out.dtype)
        return out, None, None


def _chunk_sums(logits: Tensor, tokens: _Tokens, shard: _Shard, part: slice) -> Tensor:
    """Maximum, Z', shifted logits at x and z, T and A of a chunk's tokens: [6, n]."""
    values = shard.read(logits, part, tokens.log_snr.dtype)
    zero = values.new_zeros(values.shape[0])
    (top,) = shard.reduce(values.amax(dim=-1), op=torch.distributed.ReduceOp.MAX)
    values -= top.unsqueeze(-1)
    x_column, x_here = shard.place(tokens.clean[part], logits.shape[-1])
    z_column, z_here = shard.place(tokens.noised[part], logits.shape[-1])
    at_clean = values.gather(-1, x_column).masked_fill_(~x_here, 0.0).squeeze(-1)
    at_noised = values.gather(-1, z_column).masked_fill_(~z_here, 0.0).squeeze(-1)
    _put(values.exp_(), x_column, x_here, zero)
    other, at_clean, at_noised = shard.reduce(values.sum(dim=-1), at_clean, at_noised)
    if shard.mixing.is_masked_limit:
        return torch.stack((top, other, at_clean, at_noised, zero, zero))
    values *= (tokens.rho[part] / (other + torch.exp(at_clean))).unsqueeze(-1)
    log1p_sum = torch.log1p(values).sum(dim=-1)
    share_sum = values.div_(values + 1.0).sum(dim=-1)
    log1p_sum, share_sum = shard.reduce(log1p_sum, share_sum)
    return torch.stack((top, other, at_clean, at_noised, log1p_sum, share_sum))


def _chunk_gradient(
    logits: Tensor, tokens: _Tokens, shard: _Shard, part: slice, saved: Tensor, grads: list[Tensor]
) -> Tensor:
    """d(sums . grads) / d logits for a chunk's tokens and this rank's real columns."""
    top, other, at_clean, _, _, share_sum = saved
    g_odds, g_z, g_t = grads
    clean, noised = tokens.clean[part], tokens.noised[part]
    e_x = torch.exp(at_clean)
    total = other + e_x
    g_total = (g_z + g_t * share_sum) / total
    scale = g_odds / other.clamp(min=torch.finfo(total.dtype).tiny) - g_total
    at_x = g_z * (noised == clean) - g_odds - g_total * e_x
    values = shard.read(logits, part, total.dtype).sub_(top.unsqueeze(-1)).exp_()
    if shard.mixing.is_masked_limit:
        values *= scale.unsqueeze(-1)
    else:
        share = values * (tokens.rho[part] / total).unsqueeze(-1)
        share.div_(share + 1.0)
        values = values.mul_(scale.unsqueeze(-1)).addcmul_(share, g_t.unsqueeze(-1))
    x_column, x_here = shard.place(clean, logits.shape[-1])
    z_column, z_here = shard.place(noised, logits.shape[-1])
    values.scatter_add_(-1, z_column, g_z.unsqueeze(-1) * z_here)
    return _put(values, x_column, x_here, at_x)


def _put(values: Tensor, column: Tensor, here: Tensor, new: Tensor) -> Tensor:
    """Set one entry of each row, where it is `here`, in place and without asking the host which rows those are."""
    return values.scatter_(-1, column, torch.where(here, new.unsqueeze(-1), values.gather(-1, column)))


def _check(
    logits: Tensor, clean: Tensor, noised: Tensor, log_snr: Tensor, needed: Tensor | None, chunk_tokens: int
) -> None:
    check_token_shapes(clean, noised, log_snr)
    if logits.shape[:-1] != clean.shape or (needed is not None and needed.shape != clean.shape):
        got = (tuple(logits.shape), None if needed is None else tuple(needed.shape))
        raise ValueError(f"logits must have shape {(*clean.shape, '*')} and needed that of clean, got {got}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")


def _computed(noised: Tensor, mixing: Mixing, needed: Tensor | None) -> Tensor | None:
    """Indices of the tokens worth computing, or None for all."""
    if mixing.is_masked_limit:
        is_mask = noised == mixing.mask_id
        needed = is_mask if needed is None else needed & is_mask
    return None if needed is None else needed.nonzero().squeeze(-1)


def _gradient_buffer(logits: Tensor, shard: _Shard) -> Tensor:
    """Where the gradient goes: zero outside the tokens computed and in padding columns."""
    out = logits.detach() if shard.overwrite_logits else torch.empty_like(logits)
    out[:, max(1, shard.real_columns(logits.shape[-1])) :] = 0
    if shard.computed is not None:
        skipped = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
        skipped[shard.computed] = False
        out[skipped] = 0
    return out


def _scatter(term: Tensor, computed: Tensor | None, shape: torch.Size) -> Tensor:
    """Per-token values back in their places, 0 where nothing was computed."""
    if computed is not None:
        term = term.new_zeros(shape.numel()).index_copy(0, computed, term)
    return term.reshape(shape)
