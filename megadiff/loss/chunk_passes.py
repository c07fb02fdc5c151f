"""The passes over a chunk of logits: the results that each must return, and their implementation in plain torch.

A chunk's tokens are combined with its logits [n, V / tp] three times, since each pass needs sums over the whole
vocabulary from the previous one. With l_v this rank's logits, max_logit their maximum, and x and z a token's clean and
noised id:

    sums         max_logit, sum over v != x of e^(l_v - max_logit), and the logits at x and z
    log1p_sums   with y_v = scale e^(l_v - max_logit), over v != x: T = sum log(1 + y_v) and A = sum y_v / (1 + y_v)
    gradient     g_v = y_v (slope + log1p_slope / (1 + y_v)), then `noised_logit` added at z and `clean_logit` put at x

Columns of the mask and of padding are excluded and get no gradient. Passes may overwrite the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megadiff.loss.vocab_shard import VocabShard

_CACHE_ELEMENTS = 2**17
"""Number of elements per block on the CPU, so that a pass's operations find them in the second-level cache."""


class LogitSums(NamedTuple):
    """Results of the first pass on this rank, each [n] in the dtype of computation."""

    max_logit: Tensor
    """Largest logit; the smallest finite number if no column is real."""
    other: Tensor
    """Sum over real v != x of e^(l_v - max_logit)."""
    clean_logit: Tensor
    """Logit of x; 0 if x is not on this rank."""
    noised_logit: Tensor
    """Logit of z; 0 if z is not on this rank, or is the mask."""


class ChunkPasses(Protocol):
    """The passes over one chunk, in this order; `shares` is skipped for masked noise."""

    def sums(self) -> LogitSums:
        """Run the first pass."""
        ...

    def log1p_sums(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return (T, A) for scale [n]."""
        ...

    def gradient(
        self, scale: Tensor, slope: Tensor, log1p_slope: Tensor | None, clean_logit: Tensor, noised_logit: Tensor
    ) -> Tensor:
        """Return the gradient [n, V / tp] in the logits' dtype; all arguments [n]; `log1p_slope` None means 0."""
        ...


class MakePasses(Protocol):
    """Factory of the passes over a chunk."""

    def __call__(self, logits: Tensor, clean: Tensor, noised: Tensor, shard: VocabShard) -> ChunkPasses:
        """Return the passes for logits [n, V / tp] and ids [n] of the chunk, and this rank's columns."""
        ...


class TorchPasses:
    """Passes in plain torch, on any device; low-precision logits are processed as a float32 copy.

    The logits are overwritten: by e^(l - max_logit) in the first pass, by y in the second, by the gradient in the
    third. Entries of x, the mask and padding are zero, so sums need no special case.
    """

    def __init__(self, logits: Tensor, clean: Tensor, noised: Tensor, shard: VocabShard) -> None:
        self._dtype = logits.dtype
        self._values = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        self._shard = shard
        self._clean, self._noised = shard.local_index(clean), shard.local_index(noised)

    def sums(self) -> LogitSums:
        """Run the first pass; see the module's docstring."""
        found = LogitSums(*(self._values.new_empty(len(self._values)) for _ in LogitSums._fields))
        for rows in self._blocks():
            values = self._values[rows]
            self._shard.mask_invalid(values)
            found.clean_logit[rows], found.noised_logit[rows] = (
                self._read(values, self._clean, rows),
                self._read(values, self._noised, rows),
            )
            max_logit = values.amax(dim=-1).clamp_(min=torch.finfo(values.dtype).min)
            found.max_logit[rows] = max_logit
            values.sub_(max_logit.unsqueeze(-1)).exp_()
            self._put(values, self._clean, rows, torch.zeros_like(max_logit))
            torch.sum(values, dim=-1, out=found.other[rows])
        return found

    def log1p_sums(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Run the second pass; see the module's docstring."""
        log1p_sum, fraction_sum = torch.empty_like(scale), torch.empty_like(scale)
        for rows in self._blocks():
            values = self._values[rows]
            values.mul_(scale[rows, None])
            scratch = torch.log1p(values)
            torch.sum(scratch, dim=-1, out=log1p_sum[rows])
            torch.div(values, torch.add(values, 1.0, out=scratch), out=scratch)
            torch.sum(scratch, dim=-1, out=fraction_sum[rows])
        return log1p_sum, fraction_sum

    def gradient(
        self, scale: Tensor, slope: Tensor, log1p_slope: Tensor | None, clean_logit: Tensor, noised_logit: Tensor
    ) -> Tensor:
        """Run the third pass; see the module's docstring."""
        for rows in self._blocks():
            values = self._values[rows]
            if log1p_slope is None:
                values.mul_((scale * slope)[rows, None])
            else:
                factor = values + 1.0
                torch.div(log1p_slope[rows, None], factor, out=factor)
                values.mul_(factor.add_(slope[rows, None]))
            column, here = self._noised
            values.scatter_add_(-1, column[rows], noised_logit[rows, None] * here[rows])
            self._put(values, self._clean, rows, clean_logit[rows])
        return self._values.to(self._dtype)

    def _blocks(self) -> Iterator[slice]:
        count, width = self._values.shape
        step = count if self._values.is_cuda else max(1, _CACHE_ELEMENTS // max(1, width))
        return (slice(first, min(first + step, count)) for first in range(0, count, max(1, step)))

    @staticmethod
    def _read(values: Tensor, place: tuple[Tensor, Tensor], rows: slice) -> Tensor:
        column, here = place
        return values.gather(-1, column[rows]).masked_fill_(~here[rows], 0.0).squeeze(-1)

    @staticmethod
    def _put(values: Tensor, place: tuple[Tensor, Tensor], rows: slice, new: Tensor) -> None:
        """Write one local entry per row without a device-to-host sync."""
        column, here = place[0][rows], place[1][rows]
        values.scatter_(-1, column, torch.where(here, new.unsqueeze(-1), values.gather(-1, column)))
