"""The best learning rate of a sweep, and its shift between model sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Optimum:
    """The minimum of a curve of loss over learning rate."""

    rate: float
    """Best learning rate of the grid."""
    loss: float
    vertex: float
    """Lowest point of the parabola through the best rate and its neighbours in log rate; `rate` at an edge."""
    is_inside: bool
    """Whether the grid continues on both sides; at an edge the true optimum may lie beyond it."""


def optimum(losses: Mapping[float, float]) -> Optimum:
    """Return the optimum of {rate: loss}; the loss of a diverged run may be infinite or NaN.

    Raises:
        ValueError: no run has a finite loss.
    """
    grid = sorted(losses)
    finite = [rate for rate in grid if math.isfinite(losses[rate])]
    if not finite:
        raise ValueError(f"none of the {len(grid)} runs has a finite loss")
    best = min(finite, key=lambda rate: losses[rate])
    place = grid.index(best)
    is_inside = 0 < place < len(grid) - 1
    vertex = best
    if is_inside and all(math.isfinite(losses[grid[place + side]]) for side in (-1, 1)):
        (x0, y0), (x1, y1), (x2, y2) = ((math.log(r), losses[r]) for r in grid[place - 1 : place + 2])
        left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        curvature = (right - left) / (x2 - x0)
        if curvature > 0:
            vertex = math.exp((x0 + x1) / 2 - left / (2 * curvature))
    return Optimum(best, losses[best], vertex, is_inside)


def grid_steps_apart(optima: Iterable[Optimum], *, factor: float) -> float:
    """Return the number of steps of a geometric grid between the smallest and the largest best rate."""
    rates = [found.rate for found in optima]
    return math.log(max(rates) / min(rates)) / math.log(factor)
