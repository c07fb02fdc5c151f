"""The output head and the objective in one pass over chunks of tokens: logits exist for one chunk, and are made once.

A chunk's tokens are combined with its logits [n, V / tp] three times, since each pass needs sums over the whole
vocabulary from the previous one. With l_v this rank's logits, max_logit their maximum, and x and z a token's clean and
noised id:

    sums         max_logit, sum over v != x of e^(l_v - max_logit), and the logits at x and z
    log1p_sums   with y_v = scale e^(l_v - max_logit), over v != x: T = sum log(1 + y_v) and A = sum y_v / (1 + y_v)
    gradient     g_v = y_v (slope + log1p_slope / (1 + y_v)), then `noised_logit` added at z and `clean_logit` put at x

Columns of the mask and of padding are excluded and get no gradient. Passes may overwrite the logits.

For each chunk of n tokens, with H its hidden states and W this rank's columns of the head

    logits = H W^T                                            2 n d V flops
    three passes over them (`TorchPasses`): sums over the vocabulary, the gradient in their place
    dH = g W,  dW += g^T H                                     4 n d V flops

so the total cost is 6 d V flops per token plus three passes over a chunk; only the two gradients are kept for the
backward pass, which multiplies them by the incoming scalar. Only tokens that can have a loss are computed: under masked
noise, only masks.

If the vocabulary is sharded over ranks, a chunk needs three small all-reduces:

    MAX   the row's maximum                                            4 bytes a token
    SUM   sum over real v != x of e_v, and the logits at x, z          12 bytes
    SUM   T = sum of log1p(y_v), A = sum of y_v / (1 + y_v)             8 bytes (not under masked noise)

The gradient needs none: each rank fills its own columns.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadiff import loss
from megadiff.diffusion.objective import (
    LOG_RHO_LIMIT,
    Terms,
    VocabularySums,
    log1p_exp,
    terms_from_sums,
)
from megadiff.diffusion.shapes import Bool, Float, Int
from megadiff.errors import ConfigError
from megadiff.loss.lm_head import LossInputs, LossOutput, LossSpec, VocabShard, plain_objective
from megadiff.platform import matrix_products

_CACHE_ELEMENTS = 2**17
"""Number of elements per block on the CPU, so that a pass's operations find them in the second-level cache."""


def add_product(
    total: Float[Tensor, "V D"], a: Float[Tensor, "V N"], b: Float[Tensor, "N D"], *, is_first: bool
) -> None:
    """total (+)= a @ b, in place; the first product overwrites what `total` held.

    Args:
        total: float32 or the factors' own dtype.
        a, b: factors of one dtype.
    """
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if is_first else 1, out=total)
    elif total.is_cuda and not matrix_products.problem_of(total.device):
        matrix_products.add_product(total, a, b, beta=0 if is_first else 1)
    elif is_first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


class LogitSums(NamedTuple):
    """Results of the first pass on this rank, in the dtype of computation."""

    max_logit: Float[Tensor, " N"]
    """Largest logit; the smallest finite number if no column is real."""
    other: Float[Tensor, " N"]
    """Sum over real v != x of e^(l_v - max_logit)."""
    clean_logit: Float[Tensor, " N"]
    """Logit of x; 0 if x is not on this rank."""
    noised_logit: Float[Tensor, " N"]
    """Logit of z; 0 if z is not on this rank, or is the mask."""


@runtime_checkable
class ChunkPasses(Protocol):
    """The passes over one chunk, in this order; `log1p_sums` is skipped for masked noise."""

    def sums(self) -> LogitSums:
        """Run the first pass."""
        ...

    def log1p_sums(self, scale: Float[Tensor, " N"]) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Return (T, A)."""
        ...

    def gradient(
        self,
        scale: Float[Tensor, " N"],
        slope: Float[Tensor, " N"],
        log1p_slope: Float[Tensor, " N"] | None,
        clean_logit: Float[Tensor, " N"],
        noised_logit: Float[Tensor, " N"],
    ) -> Float[Tensor, "N V"]:
        """Return the gradient in the logits' dtype; `log1p_slope` None means 0."""
        ...


@runtime_checkable
class MakePasses(Protocol):
    """Factory of the passes over a chunk."""

    def __call__(
        self, logits: Float[Tensor, "N V"], clean: Int[Tensor, " N"], noised: Int[Tensor, " N"], shard: VocabShard
    ) -> ChunkPasses:
        """Return the passes for the logits and ids of a chunk, and this rank's columns."""
        ...


class TorchPasses:
    """Passes in plain torch, on any device; low-precision logits are processed as a float32 copy.

    The logits are overwritten: by e^(l - max_logit) in the first pass, by y in the second, by the gradient in the
    third. Entries of x, the mask and padding are zero, so sums need no special case.
    """

    def __init__(
        self, logits: Float[Tensor, "N V"], clean: Int[Tensor, " N"], noised: Int[Tensor, " N"], shard: VocabShard
    ) -> None:
        self._dtype = logits.dtype
        self._values = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        self._shard = shard
        self._noised = shard.local_index(noised)
        # Clean ids hold no mask, so all of them are in a whole vocabulary.
        self._clean = (clean.unsqueeze(-1), None) if shard.is_whole else shard.local_index(clean)

    def sums(self) -> LogitSums:
        """Run the first pass; see the module's docstring."""
        found = [self._block_sums(rows) for rows in self._blocks()]
        return found[0] if len(found) == 1 else LogitSums(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _block_sums(self, rows: slice | None) -> LogitSums:
        values = _part(self._values, rows)
        self._shard.mask_invalid(values)
        clean_logit, noised_logit = self._read(values, self._clean, rows), self._read(values, self._noised, rows)
        max_logit = values.amax(dim=-1).clamp_(min=torch.finfo(values.dtype).min)
        values.sub_(max_logit.unsqueeze(-1)).exp_()
        self._put(values, self._clean, rows, torch.zeros_like(max_logit))
        return LogitSums(max_logit, values.sum(dim=-1), clean_logit, noised_logit)

    def log1p_sums(self, scale: Float[Tensor, " N"]) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Run the second pass; see the module's docstring."""
        log1p_sum, fraction_sum = torch.empty_like(scale), torch.empty_like(scale)
        for rows in self._blocks():
            values = _part(self._values, rows)
            values.mul_(_part(scale, rows).unsqueeze(-1))
            scratch = torch.log1p(values)
            torch.sum(scratch, dim=-1, out=_part(log1p_sum, rows))
            torch.div(values, torch.add(values, 1.0, out=scratch), out=scratch)
            torch.sum(scratch, dim=-1, out=_part(fraction_sum, rows))
        return log1p_sum, fraction_sum

    def gradient(
        self,
        scale: Float[Tensor, " N"],
        slope: Float[Tensor, " N"],
        log1p_slope: Float[Tensor, " N"] | None,
        clean_logit: Float[Tensor, " N"],
        noised_logit: Float[Tensor, " N"],
    ) -> Float[Tensor, "N V"]:
        """Run the third pass; see the module's docstring."""
        for rows in self._blocks():
            values = _part(self._values, rows)
            if log1p_slope is None:
                values.mul_(_part(scale * slope, rows).unsqueeze(-1))
            else:
                factor = values + 1.0
                torch.div(_part(log1p_slope, rows).unsqueeze(-1), factor, out=factor)
                values.mul_(factor.add_(_part(slope, rows).unsqueeze(-1)))
            column, here = (_part(place, rows) for place in self._noised)
            values.scatter_add_(-1, column, _part(noised_logit, rows).unsqueeze(-1) * here)
            self._put(values, self._clean, rows, _part(clean_logit, rows))
        return self._values.to(self._dtype)

    def _blocks(self) -> list[slice | None]:
        """Return the blocks of rows; None for all of them in one."""
        count, width = self._values.shape
        step = count if self._values.is_cuda else max(1, _CACHE_ELEMENTS // max(1, width))
        return [None] if step >= count else [slice(first, first + step) for first in range(0, count, step)]

    @staticmethod
    def _read(values: Tensor, place: tuple[Tensor, Tensor | None], rows: slice | None) -> Tensor:
        column, here = _part(place[0], rows), place[1]
        found = values.gather(-1, column)
        return (found if here is None else found.masked_fill_(~_part(here, rows), 0.0)).squeeze(-1)

    @staticmethod
    def _put(values: Tensor, place: tuple[Tensor, Tensor | None], rows: slice | None, new: Tensor) -> None:
        """Write one local entry per row without a device-to-host sync."""
        column, here = _part(place[0], rows), place[1]
        written = new.unsqueeze(-1)
        if here is not None:
            written = torch.where(_part(here, rows), written, values.gather(-1, column))
        values.scatter_(-1, column, written)


def _part(values: Tensor, rows: slice | None) -> Tensor:
    """Return a block of rows; all of them, without a view, for None."""
    return values if rows is None else values[rows]


def fused_objective(
    hidden: Float[Tensor, "... D"],
    weight: Float[Tensor, "V D"],
    tokens: LossInputs,
    spec: LossSpec,
    *,
    shard: VocabShard | None = None,
    passes: MakePasses = TorchPasses,
    chunk_tokens: int | None = None,
) -> LossOutput:
    """Compute `gidd_objective` of the logits hidden @ weight^T, which are never complete in memory.

    Args:
        hidden: axes as those of `tokens`; the same on every rank of the group. Its gradient is this rank's
            part: the caller adds the parts up, as for any column-parallel layer.
        weight: this rank's columns of the head, in the dtype of `hidden`. If it has a `main_grad` (from
            megatron-core's data-parallel wrapper), its gradient is added to that in float32.
        tokens: the ids and levels, and which of them count.
        spec: the objective.
        shard: the columns that `weight` holds; None for all of them.
        passes: implementation of a chunk's passes.
        chunk_tokens: number of tokens per chunk, with which memory grows; None chooses it for the device.

    Returns:
        Loss and terms in float32 (float64 for float64 states), the same on every rank.

    Raises:
        ValueError: shapes that do not agree, or a chunk below 1.
        ConfigError: a weighting that the noise does not have.
    """
    tokens.check(hidden)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    job = _Job(
        tokens=tokens.selected(torch.float64 if hidden.dtype == torch.float64 else torch.float32),
        spec=spec,
        shard=shard or VocabShard.of(weight, spec.process),
        passes=passes,
        chunk_tokens=chunk_tokens or _chunk_tokens(weight),
        is_training=torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad),
    )
    loss, terms = _FusedHead.apply(hidden.reshape(-1, hidden.shape[-1]), weight, job)
    return LossOutput(loss, Terms(*tokens.scattered(terms).unbind(0)), job.tokens.clean.numel())


@dataclass(frozen=True)
class _Job:
    tokens: LossInputs
    """Only the computed tokens, flat; levels in the dtype of computation."""
    spec: LossSpec
    shard: VocabShard
    passes: MakePasses
    chunk_tokens: int
    is_training: bool

    def chunks(self) -> list[slice]:
        """Return as few chunks as memory allows, of about equal size: each reads and writes dW once, however short."""
        count = self.tokens.log_snr.numel()
        even = -(-count // max(1, -(-count // self.chunk_tokens)))
        size = max(1, min(self.chunk_tokens, -(-even // loss.CHUNK_ROWS) * loss.CHUNK_ROWS))
        return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _chunk_tokens(weight: Float[Tensor, "V D"]) -> int:
    logits = loss.CHUNK_LOGITS["bf16" if weight.is_cuda and weight.element_size() == 2 else "fp32"]
    return max(64, logits // max(1, weight.shape[0]))


class _FusedHead(torch.autograd.Function):
    """Function (hidden, weight) -> (loss, `Terms` [6, N] of the N computed tokens); forward also makes the
    gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Float[Tensor, "T D"], weight: Float[Tensor, "V D"], job: _Job
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "6 N"]]:
        """Compute loss, terms and gradients chunk by chunk."""
        gradients = _Gradients(hidden, weight, job.tokens) if job.is_training else None
        parts = [_chunk(hidden, weight, job, part, gradients) for part in job.chunks()]
        nothing = job.tokens.log_snr.new_zeros(len(Terms._fields), 0)
        terms = parts[0] if len(parts) == 1 else torch.cat([*parts, nothing], dim=1)
        ctx.gradients, ctx.weight = gradients, weight
        ctx.mark_non_differentiable(terms)
        return terms[Terms._fields.index("minimised")].sum(), terms

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, loss_grad: Float[Tensor, ""], *_: Tensor
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "V D"], None]:
        """Scale the gradients made in the forward pass."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("a fused head's gradients can be computed only once")
        return gradients.hidden.mul_(loss_grad), gradients.of_weight(ctx.weight, loss_grad), None


class _Gradients:
    """Gradients of the loss itself, filled chunk by chunk."""

    def __init__(self, hidden: Float[Tensor, "T D"], weight: Float[Tensor, "V D"], tokens: LossInputs) -> None:
        self.hidden = torch.empty_like(hidden) if tokens.active_indices is None else torch.zeros_like(hidden)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self._weight = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self._is_empty = True

    def add(
        self,
        logits_grad: Float[Tensor, "N V"],
        states: Float[Tensor, "N D"],
        weight: Float[Tensor, "V D"],
        indices: slice | Int[Tensor, " N"],
    ) -> None:
        """Add a chunk's part: dH = g W, dW += g^T H."""
        if isinstance(indices, slice):
            torch.mm(logits_grad, weight, out=self.hidden[indices])
        else:
            self.hidden.index_copy_(0, indices, logits_grad @ weight)
        add_product(self._weight, logits_grad.t(), states, is_first=self._is_empty)
        self._is_empty = False

    def of_weight(self, weight: Float[Tensor, "V D"], factor: Float[Tensor, ""]) -> Float[Tensor, "V D"]:
        """Return the weight's gradient times `factor`, or a placeholder if it was added to the weight's `main_grad`."""
        if self._is_empty:
            self._weight.zero_()
        main_grad = getattr(weight, "main_grad", None)
        if main_grad is None:
            return self._weight.mul_(factor).to(weight.dtype)
        main_grad.addcmul_(self._weight, factor)
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  read by the data-parallel hook
        return torch.empty_like(weight)


def _chunk(
    hidden: Float[Tensor, "T D"], weight: Float[Tensor, "V D"], job: _Job, part: slice, gradients: _Gradients | None
) -> Float[Tensor, "6 N"]:
    """Return the terms of a chunk's tokens; add their gradients to `gradients`."""
    shard, is_masked = job.shard, job.spec.process.is_masked_limit
    indices, tokens = job.tokens.indices(part), job.tokens.part(part)
    states = hidden[indices]
    clean, noised, log_snr = tokens.clean, tokens.noised, tokens.log_snr
    passes = job.passes(states @ weight.t(), clean, noised, shard)
    found = _whole(passes.sums(), clean, noised, shard, log_snr.dtype)
    scale, log1p_sum, fraction_sum = found.shift, None, None
    rho = None
    if not is_masked:
        rho = torch.exp(job.spec.process.log_rho(log_snr).clamp(max=LOG_RHO_LIMIT))
        scale = found.shift * (rho / found.total)
        log1p_sum, fraction_sum = shard.reduce(*passes.log1p_sums(scale))
    values, slopes = _terms(found, log1p_sum, tokens, job)
    if gradients is not None and slopes is not None:
        arguments = _gradient_arguments(found, fraction_sum, slopes, noised == clean, rho)
        gradients.add(passes.gradient(scale, *arguments), states, weight, indices)
    return values


class _Sums(NamedTuple):
    """Sums of a chunk over the whole vocabulary; logits are relative to the whole row's maximum."""

    shift: Float[Tensor, " N"]
    """Factor e^(this rank's maximum - the whole row's)."""
    other: Float[Tensor, " N"]
    clean_logit: Float[Tensor, " N"]
    noised_logit: Float[Tensor, " N"]

    @property
    def e_clean(self) -> Float[Tensor, " N"]:
        return torch.exp(self.clean_logit)

    @property
    def total(self) -> Float[Tensor, " N"]:
        """Sum Z over all real tokens."""
        return self.other + self.e_clean


def _whole(
    own: LogitSums, clean: Int[Tensor, " N"], noised: Int[Tensor, " N"], shard: VocabShard, dtype: torch.dtype
) -> _Sums:
    """Combine this rank's sums with the others', in two collectives; a rank that holds the vocabulary has them all."""
    if own.max_logit.dtype != dtype:
        own = LogitSums(*(value.to(dtype) for value in own))
    if shard.group is None:
        noised_logit = torch.where(shard.is_here(noised), own.noised_logit - own.max_logit, 0.0)
        return _Sums(torch.ones_like(own.max_logit), own.other, own.clean_logit - own.max_logit, noised_logit)
    (max_logit,) = shard.reduce(own.max_logit, op=torch.distributed.ReduceOp.MAX)
    shift = torch.exp(own.max_logit - max_logit)
    clean_logit = torch.where(shard.is_here(clean), own.clean_logit - max_logit, 0.0)
    noised_logit = torch.where(shard.is_here(noised), own.noised_logit - max_logit, 0.0)
    return _Sums(shift, *shard.reduce(own.other * shift, clean_logit, noised_logit))


def _terms(
    found: _Sums, log1p_sum: Float[Tensor, " N"] | None, tokens: LossInputs, job: _Job
) -> tuple[Float[Tensor, "6 N"], tuple[Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"] | None] | None]:
    """Return the terms, and in training the slopes of what is minimised in (log odds, log p_z, T)."""
    spec = job.spec
    log_odds = torch.log(found.other.clamp(min=torch.finfo(found.other.dtype).tiny)) - found.clean_logit
    log_p_noised = found.noised_logit - found.clean_logit - log1p_exp(log_odds)
    inputs = [log_odds, log_p_noised] if log1p_sum is None else [log_odds, log_p_noised, log1p_sum]
    with torch.set_grad_enabled(job.is_training):
        leaves = [value.detach().requires_grad_(job.is_training) for value in inputs]
        terms = terms_from_sums(
            VocabularySums(*leaves, **({"log1p_sum": None} if log1p_sum is None else {})),
            tokens.clean,
            tokens.noised,
            tokens.log_snr,
            process=spec.process,
            weighting=spec.weighting,
        )
        slopes = None
        if job.is_training:
            found_slopes = torch.autograd.grad(terms.minimised.sum(), leaves, allow_unused=True, materialize_grads=True)
            slopes = (found_slopes[0], found_slopes[1], None if log1p_sum is None else found_slopes[2])
    return torch.stack(list(terms)).detach(), slopes


def _gradient_arguments(
    found: _Sums,
    fraction_sum: Float[Tensor, " N"] | None,
    slopes: tuple[Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"] | None],
    is_kept: Bool[Tensor, " N"],
    rho: Float[Tensor, " N"] | None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None, Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return the arguments of the last pass, from the loss's slopes in its sums (g_odds, g_z, g_T).

    With G = (g_z + g_T A) / Z, e_v = e^(l_v - max_logit) and s_v = y_v / (1 + y_v), d loss / d l_v is, for real v,

        v != x    e_v (g_odds / Z' - G) + g_T s_v + g_z 1[v = z]
        v  = x    -g_odds + g_z 1[x = z] - G e_x
    """
    g_odds, g_z, g_t = slopes
    total, e_clean = found.total, found.e_clean
    through_total = (g_z if g_t is None or fraction_sum is None else g_z + g_t * fraction_sum) / total
    slope = g_odds / found.other.clamp(min=torch.finfo(total.dtype).tiny) - through_total
    if rho is not None:
        slope = slope * (total / rho)  # slope in y rather than in e
    return slope, g_t, g_z * is_kept - g_odds - through_total * e_clean, g_z


LossKernelName = Literal["auto", "plain", "chunked", "triton"]
LossKernel = Callable[..., LossOutput]
"""Function (hidden, weight, tokens, spec, *, shard) -> `LossOutput`; see `fused_lm_head.fused_objective`."""


def choose_loss_kernel(wanted: LossKernelName, *, is_cpu: bool) -> tuple[str, LossKernel]:
    """Return the implementation's description, for the log, and the implementation.

    Args:
        wanted: auto takes triton on GPUs if it is installed, else chunked.
        is_cpu: whether ranks run on the CPU, for which Triton has no compiler.

    Raises:
        ConfigError: triton was requested and cannot run here.
    """
    problem = _what_keeps_triton_away(is_cpu=is_cpu)
    if wanted == "triton" and problem is not None:
        raise ConfigError(
            f"objective.loss_kernel is triton, but {problem}; set objective.loss_kernel to auto or chunked"
        )
    name, why = wanted, ""
    if wanted == "auto":
        name, why = ("triton", "") if problem is None else ("chunked", f", since {problem}")
    kernels: dict[str, LossKernel] = {"plain": plain_objective, "chunked": fused_objective}
    return name + why, _triton_kernel() if name == "triton" else kernels[name]


def _what_keeps_triton_away(*, is_cpu: bool) -> str | None:
    if is_cpu:
        return "this run is on CPU ranks and Triton compiles for GPUs alone"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (a CUDA build of torch brings it; pip install triton)"
    return None


def _triton_kernel() -> LossKernel:
    from megadiff.loss.triton_passes import TritonPasses

    return partial(fused_objective, passes=TritonPasses)
