"""The passes over a chunk of logits as three Triton kernels that work on the logits in place.

Each row has one program, which processes it in steps of `TILES` tiles of `TILE` columns. A pass should be bound by
memory: of a two-byte logit the first two passes read 2 bytes and the last reads and writes 4, so on a GPU of 3.35 TB/s
(H100) a logit takes 0.6, 0.6 and 1.2 ps, in which its multiprocessors issue 18 instructions for every 2 bytes. Hence

- all tiles of a step are loaded before the first is used: 4 loads of 16 bytes per thread are in flight;
- there is one rescaling of the running sum per step, and one logarithm and one reciprocal for the four columns at one
  place of the tiles, which one thread holds (`_joined`): special functions run at an eighth of the rate;
- a program has 4 warps: 8 neighbouring two-byte columns for each of 128 threads make a tile. A chunk has thousands of
  rows, so other programs on the same multiprocessor hide the memory latency.

Sums are kept in float32, one per lane, and added up at the row's end. Logits stay unchanged until the last pass
replaces them by the gradient. Nothing depends on the number of rows, so chunks of any length run the same compiled
kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]  optional
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from megadiff.loss.fused_lm_head import LogitSums
from megadiff.loss.lm_head import VocabShard

_CONSTANTS: dict[str, Any] = {"TILES": 4, "TILE": 1024, "num_warps": 4, "enable_fp_fusion": True}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LOG2_E = tl.constexpr(math.log2(math.e))
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_LARGEST_Y = tl.constexpr(2.0**31)
"""Upper bound on y in T, with which the product of four factors stays below 2^128. T enters the loss as c T, of which
at most 2.2e-8 alpha (1 - p_x) is lost for rho up to 1e30: each y beyond takes at least 2^31 of the row's sum,
rho (1 - p_x).
"""
_NOT_SPECIALISED = ["start", "real", "mask_column"]


class TritonPasses:
    """Passes in Triton, on the logits' device; the last pass replaces the logits by the gradient.

    Raises:
        ValueError: float64 logits (nothing here is computed beyond float32), or rows that are not contiguous.
    """

    def __init__(self, logits: Tensor, clean: Tensor, noised: Tensor, shard: VocabShard) -> None:
        if logits.dtype not in _DTYPES or logits.stride(-1) != 1:
            raise ValueError(
                "logits must be float32, bfloat16 or float16 with contiguous rows, "
                f"got {logits.dtype} with strides {logits.stride()}"
            )
        self._logits = logits
        self._ids = clean.contiguous(), noised.contiguous()
        column = -1 if shard.mask_column is None else shard.mask_column
        self._columns = (logits.stride(0), logits.shape[1], shard.start, shard.num_valid, column)
        self._max_logit = self._per_row()

    def sums(self) -> LogitSums:
        """Run the first pass; see `fused_lm_head.ChunkPasses`."""
        other, clean_logit, noised_logit = self._per_row(), self._per_row(), self._per_row()
        self._run(_sums, *self._ids, self._max_logit, other, clean_logit, noised_logit)
        return LogitSums(self._max_logit, other, clean_logit, noised_logit)

    def log1p_sums(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Run the second pass; see `fused_lm_head.ChunkPasses`."""
        log1p_sum, fraction_sum = self._per_row(), self._per_row()
        self._run(_log1p_sums, self._ids[0], self._max_logit, scale.contiguous(), log1p_sum, fraction_sum)
        return log1p_sum, fraction_sum

    def gradient(
        self, scale: Tensor, slope: Tensor, log1p_slope: Tensor | None, clean_logit: Tensor, noised_logit: Tensor
    ) -> Tensor:
        """Run the third pass; see `fused_lm_head.ChunkPasses`."""
        has_log1p = log1p_slope is not None
        factors = (scale, slope, log1p_slope) if has_log1p else (scale * slope, slope, slope)
        values = (value.contiguous() for value in (*factors, clean_logit, noised_logit))
        self._run(_gradient, *self._ids, self._max_logit, *values, HAS_LOG1P=has_log1p)
        return self._logits

    def _per_row(self) -> Tensor:
        return self._logits.new_empty(len(self._logits), dtype=torch.float32)

    def _run(self, kernel: Any, *per_row: Tensor, **constants: Any) -> None:
        if len(self._logits):
            grid = (len(self._logits),)
            kernel[grid](self._logits, *per_row, *self._columns, **constants, **_CONSTANTS)


@triton.jit
def _column_of(ids, row, start, real, mask_column):
    """Return the local column of a row's id; -1 if it is on another rank, or is the mask."""
    column = tl.load(ids + row) - start
    return tl.where((column >= 0) & (column < real) & (column != mask_column), column, -1)


@triton.jit
def _is_in_step(column, first, STEP: tl.constexpr):
    return (column >= first) & (column < first + STEP)


@triton.jit
def _exp(x):
    """Compute e^x as a power of 2: one instruction, while `tl.exp` guards subnormal results with three more."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _load(line, columns, first, width, real, clean, mask_column, STEP: tl.constexpr):
    """Load the logits of a step in float32, -inf for excluded columns.

    Loads are masked by the buffer width alone, usually a multiple of 16, so they remain 16-byte vector loads. Few steps
    hold an excluded column, so the comparisons are behind a branch that all of a program's threads take together.
    """
    values = tl.load(line + columns, mask=columns < width, other=0.0).to(tl.float32)
    if (first + STEP > real) | _is_in_step(clean, first, STEP) | _is_in_step(mask_column, first, STEP):
        is_left_out = (columns >= real) | (columns == clean) | (columns == mask_column)
        values = tl.where(is_left_out, -float("inf"), values)
    return values


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _sums(
    logits,
    clean_ids,
    noised_ids,
    top_out,
    other_out,
    at_clean_out,
    at_noised_out,
    stride,
    width,
    start,
    real,
    mask_column,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute max_logit over all real columns, and the sum of e^(l - max_logit) over those except x, in one read."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    clean = _column_of(clean_ids, row, start, real, mask_column)
    noised = _column_of(noised_ids, row, start, real, mask_column)
    clean_logit = tl.load(line + clean, mask=clean >= 0, other=0.0).to(tl.float32)
    noised_logit = tl.load(line + noised, mask=noised >= 0, other=0.0).to(tl.float32)

    max_logit = tl.full((TILE,), _LOWEST, tl.float32)
    max_logit = tl.where(clean >= 0, tl.maximum(max_logit, clean_logit), max_logit)
    total = tl.zeros((TILE,), tl.float32)
    lanes = tl.arange(0, TILES)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    for first in range(0, width, TILES * TILE):
        values = _load(line, first + lanes, first, width, real, clean, mask_column, TILES * TILE)
        higher = tl.maximum(max_logit, tl.max(values, axis=0))
        total = total * _exp(max_logit - higher) + tl.sum(_exp(values - higher[None, :]), axis=0)
        max_logit = higher

    row_max = tl.max(max_logit, axis=0)
    tl.store(top_out + row, row_max)
    tl.store(other_out + row, tl.sum(total * _exp(max_logit - row_max), axis=0))
    tl.store(at_clean_out + row, clean_logit)
    tl.store(at_noised_out + row, noised_logit)


@triton.jit
def _joined(w0, n0, w1, n1):
    """Join two groups of columns; a group's product of 1 + y is 1 + w, and the sum of its y / (1 + y) is n / (1 + w).

    Without subtractions, sums of many y of 1e-9 lose no digits.
    """
    return w0 + (w1 + w0 * w1), n0 + (n1 + (n0 * w1 + n1 * w0))


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _log1p_sums(
    logits,
    clean_ids,
    top_in,
    scale_in,
    log1p_out,
    fraction_out,
    stride,
    width,
    start,
    real,
    mask_column,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sum log(1 + y) and y / (1 + y) over v != x; a thread joins its columns at one place of the four tiles."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    clean = _column_of(clean_ids, row, start, real, mask_column)
    max_logit, scale = tl.load(top_in + row), tl.load(scale_in + row)

    log1p_sum = tl.zeros((TILE,), tl.float32)
    fraction_sum = tl.zeros((TILE,), tl.float32)
    lanes = tl.arange(0, TILES)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    for first in range(0, width, TILES * TILE):
        values = _load(line, first + lanes, first, width, real, clean, mask_column, TILES * TILE)
        y = tl.minimum(scale * _exp(values - max_logit), _LARGEST_Y)
        upper, lower = tl.split(tl.reshape(tl.trans(y), (TILE, 2, 2)))
        y0, y1 = tl.split(upper)
        y2, y3 = tl.split(lower)
        w01, n01 = _joined(y0, y0, y1, y1)
        w23, n23 = _joined(y2, y2, y3, y3)
        w, n = _joined(w01, n01, w23, n23)
        factor = 1.0 + w
        reciprocal = 1.0 / factor
        # the rounding error of 1 + w is corrected to first order
        log1p_sum += tl.log(factor) + (w - (factor - 1.0)) * reciprocal
        fraction_sum += n * reciprocal

    tl.store(log1p_out + row, tl.sum(log1p_sum, axis=0))
    tl.store(fraction_out + row, tl.sum(fraction_sum, axis=0))


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _gradient(
    logits,
    clean_ids,
    noised_ids,
    top_in,
    scale_in,
    slope_in,
    log1p_slope_in,
    at_clean_in,
    at_noised_in,
    stride,
    width,
    start,
    real,
    mask_column,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    HAS_LOG1P: tl.constexpr,
):
    """Write y (slope + log1p_slope / (1 + y)) in place, in the buffer dtype; `scale` has the slope unless HAS_LOG1P."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    clean = _column_of(clean_ids, row, start, real, mask_column)
    noised = _column_of(noised_ids, row, start, real, mask_column)
    max_logit, scale = tl.load(top_in + row), tl.load(scale_in + row)
    slope, log1p_slope = tl.load(slope_in + row), tl.load(log1p_slope_in + row)
    clean_logit, noised_logit = tl.load(at_clean_in + row), tl.load(at_noised_in + row)

    lanes = tl.arange(0, TILES)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    for first in range(0, width, TILES * TILE):
        columns = first + lanes
        values = _load(line, columns, first, width, real, clean, mask_column, TILES * TILE)
        grad = scale * _exp(values - max_logit)
        if HAS_LOG1P:
            grad = grad * (slope + log1p_slope / (1.0 + grad))
        if _is_in_step(clean, first, TILES * TILE) | _is_in_step(noised, first, TILES * TILE):
            grad = tl.where(columns == noised, grad + noised_logit, grad)
            grad = tl.where(columns == clean, clean_logit, grad)
        tl.store(line + columns, grad.to(logits.dtype.element_ty), mask=columns < width)
