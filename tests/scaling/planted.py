"""Data with known laws, and the count of intervals that hold the truth."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from megadiff.scaling.power import LossSurface

REPETITIONS = int(os.environ.get("MEGADIFF_FIT_REPETITIONS", "100"))
"""Number of planted data sets a coverage is counted over; more make a sharper count and take longer."""

MASKED = LossSurface.from_optimum((27.21883, -0.04961), (0.01761, 0.56629))
UNIFORM = LossSurface.from_optimum((31.26171, -0.05219), (0.00618, 0.58879))
BUDGETS = np.geomspace(5e17, 2e20, 9)
SIZES = np.geomspace(1.2e8, 7.7e9, 9)
"""FLOPs per token, a factor 64 around the optimum of 1e19 FLOPs."""


def sweep(rng, surface=MASKED, *, sizes=SIZES, noise=0.001, budgets=BUDGETS):
    """A run a size for all budgets, each with its own luck: FLOPs, FLOPs per token, loss, run."""
    size, flops = np.repeat(sizes, len(budgets)), np.tile(budgets, len(sizes))
    run = np.repeat(np.arange(len(sizes)), len(budgets))
    loss = surface(size, flops / size) * np.exp(noise * rng.standard_normal(len(sizes))[run])
    return flops, size, loss, run


def coverage(intervals: Callable, truth: dict[str, float], repetitions: int = REPETITIONS) -> dict[str, float]:
    """The fraction of data sets whose interval holds the truth, by name.

    Args:
        intervals: from a random generator to the intervals of a data set.
    """
    hits = dict.fromkeys(truth, 0)
    for seed in range(repetitions):
        found = intervals(np.random.default_rng(seed))
        for name, value in truth.items():
            low, high = found[name]
            hits[name] += low <= value <= high
    return {name: count / repetitions for name, count in hits.items()}
