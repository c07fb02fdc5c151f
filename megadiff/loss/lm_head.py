"""Inputs and outputs of a loss kernel, and the simple reference: complete logits and rows, the reference objective."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.objective import SURROGATE, Terms, Weighting, check_token_shapes, gidd_objective
from megadiff.diffusion.shapes import Bool, Float, Int


@dataclass(frozen=True)
class VocabShard:
    """Columns [start, start + width) of a vocabulary whose first `vocab_size` ids are real, mask included."""

    start: int
    """Global id of the first column."""
    width: int
    """Number of columns here; those from the vocabulary's end on are padding."""
    vocab_size: int
    mask_id: int
    group: torch.distributed.ProcessGroup | None = None
    """The ranks that share the vocabulary; None if this rank holds all of it."""

    @classmethod
    def of(
        cls,
        weight: Float[Tensor, "V D"],
        process: NoiseProcess,
        *,
        start: int = 0,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> VocabShard:
        """Return the shard of a head weight; a group of one rank communicates nothing."""
        if group is not None and torch.distributed.get_world_size(group) == 1:
            group = None
        return cls(start, weight.shape[0], process.vocab_size, process.mask_id, group)

    @cached_property
    def num_valid(self) -> int:
        """Number of columns here that are vocabulary rather than padding."""
        return max(0, min(self.width, self.vocab_size - self.start))

    @cached_property
    def mask_column(self) -> int | None:
        """Local column of the mask; None if another rank holds it."""
        column = self.mask_id - self.start
        return column if 0 <= column < self.num_valid else None

    @cached_property
    def is_whole(self) -> bool:
        """Whether the columns are the whole vocabulary."""
        return self.start == 0 and self.num_valid == self.vocab_size

    def local_index(self, ids: Int[Tensor, " N"]) -> tuple[Int[Tensor, "N 1"], Bool[Tensor, "N 1"]]:
        """Return (column, here): each id's local column, and whether it is here and not the mask.

        A column is in range even if the id is not here.
        """
        if self.is_whole:
            return ids.unsqueeze(-1), self.is_here(ids).unsqueeze(-1)
        column = (ids - self.start).unsqueeze(-1)
        return column.clamp(0, max(0, self.num_valid - 1)), self.is_here(ids).unsqueeze(-1)

    def is_here(self, ids: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
        """Return whether each id is here and not the mask."""
        is_real = ids != self.mask_id
        return is_real if self.is_whole else (ids >= self.start) & (ids < self.start + self.num_valid) & is_real

    def mask_invalid(self, logits: Float[Tensor, "N V"]) -> None:
        """Set the mask's column and the padding to -inf, in place."""
        end = self.num_valid
        if self.mask_column is not None:
            if self.mask_column == end - 1:
                end -= 1
            else:
                logits[:, self.mask_column] = -torch.inf
        if end < logits.shape[1]:
            logits[:, end:] = -torch.inf

    def reduce(
        self, *values: Float[Tensor, " N"], op: Any = torch.distributed.ReduceOp.SUM
    ) -> tuple[Float[Tensor, " N"], ...]:
        """Combine per-token values over the group, in one collective."""
        if self.group is None:
            return values
        packed = torch.stack(values)
        torch.distributed.all_reduce(packed, op=op, group=self.group)
        return packed.unbind(0)


@dataclass(frozen=True)
class LossSpec:
    """Objective to compute: arguments of `diffusion.objective.gidd_objective`."""

    process: NoiseProcess
    weighting: Weighting = SURROGATE


class LossOutput(NamedTuple):
    """Output of a loss kernel."""

    loss: Float[Tensor, ""]
    """Sum of the optimised term over the computed tokens; only this has a gradient."""
    terms: Terms
    """Terms of every token, detached; 0 in every field for tokens that were not computed."""
    head_tokens: int | None = None
    """Number of tokens whose logits were computed; None for all."""


@dataclass(frozen=True)
class LossInputs:
    """Tokens in the order of their hidden states."""

    clean: Int[Tensor, "*axes"]
    """Clean ids x."""
    noised: Int[Tensor, "*axes"]
    """Noised ids z."""
    log_snr: Float[Tensor, "*axes"]
    """Log-SNR lambda."""
    active_indices: Int[Tensor, " N"] | None = None
    """Positions of the computed tokens in the flattened axes; None for all of them. The same on every rank
    that shares the vocabulary.
    """

    def check(self, hidden: Float[Tensor, "... D"]) -> None:
        """Refuse shapes that do not agree.

        Raises:
            ValueError: they do not.
        """
        check_token_shapes(self.clean, self.noised, self.log_snr)
        if hidden.shape[:-1] != self.clean.shape:
            raise ValueError(f"hidden must have shape {(*self.clean.shape, '*')}, got {tuple(hidden.shape)}")

    def selected(self, dtype: torch.dtype) -> LossInputs:
        """Return only the computed tokens, [n]; levels in `dtype`, `active_indices` kept."""
        flat = (self.clean.reshape(-1), self.noised.reshape(-1), self.log_snr.reshape(-1).to(dtype))
        if self.active_indices is not None:
            flat = tuple(field[self.active_indices] for field in flat)
        return LossInputs(*flat, active_indices=self.active_indices)

    def part(self, part: slice) -> LossInputs:
        """Return a slice of selected tokens."""
        return replace(self, clean=self.clean[part], noised=self.noised[part], log_snr=self.log_snr[part])

    def indices(self, part: slice) -> slice | Int[Tensor, " N"]:
        """Return the positions of a slice of selected tokens among all tokens."""
        return part if self.active_indices is None else self.active_indices[part]

    def scattered(self, values: Float[Tensor, "K N"]) -> Float[Tensor, "K ..."]:
        """Return values of the computed tokens at their positions among all tokens, with 0 elsewhere."""
        if self.active_indices is not None:
            values = values.new_zeros(len(values), self.clean.numel()).index_copy(1, self.active_indices, values)
        return values.reshape(-1, *self.clean.shape)


def loss_token_indices(
    noised: Int[Tensor, "*axes"], is_noisy: Bool[Tensor, "*axes"], process: NoiseProcess
) -> Int[Tensor, " N"] | None:
    """Return the positions of the tokens that can have a loss, in the flattened axes of `noised`; None for all.

    Only noisy tokens do, and under masked noise only masks: any other has weight 0. Call this with tensors on the CPU,
    since the host has to know their number.
    """
    if process.is_masked_limit:
        is_noisy = is_noisy & (noised == process.mask_id)
    return None if bool(is_noisy.all()) else is_noisy.reshape(-1).nonzero().squeeze(-1)


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
