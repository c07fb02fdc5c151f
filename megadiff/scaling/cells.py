"""Points of one model size and one budget: a single rule for bowls, best settings and laws of batch and rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megadiff.scaling.resampling import Floats

SAME_BUDGET, SAME_SIZE = 0.02, 1e-6
"""Relative gaps up to which FLOPs are one budget, and FLOPs per token those of one model."""


def budget_codes(flops: Sequence[float] | Floats) -> NDArray[np.int64]:
    """Return the number of each point's budget, ascending; a gap of more than 2 % begins another budget."""
    return _codes(flops, SAME_BUDGET)


def size_codes(flops_per_token: Sequence[float] | Floats) -> NDArray[np.int64]:
    """Return the number of each point's model size, ascending; sizes differ by more than rounding."""
    return _codes(flops_per_token, SAME_SIZE)


def cell_codes(flops_per_token: Sequence[float], flops: Sequence[float]) -> list[tuple[int, int]]:
    """Return the numbers of each point's size and budget."""
    return list(zip(size_codes(flops_per_token).tolist(), budget_codes(flops).tolist(), strict=True))


def _codes(values: Sequence[float] | Floats, gap: float) -> NDArray[np.int64]:
    found = np.asarray(values, dtype=float)
    order = np.argsort(found, kind="stable")
    codes = np.zeros(len(found), dtype=np.int64)
    codes[order[1:]] = np.cumsum(np.diff(np.log(found[order])) > np.log1p(gap))
    return codes
