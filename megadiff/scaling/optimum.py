"""Measurements over models of many sizes: slopes of activation sizes, and optima of learning rates.

A statistic measured over a grid of (width, depth) gives a line per fixed depth over the widths, and a line per fixed
width over the depths. y ~ x^slope; a line needs three points.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Axis = Literal["width", "depth"]
Size = tuple[int, int]
"""(width, depth)."""

POINTS = 3
"""Smallest number of points of a line."""


@dataclass(frozen=True)
class Band:
    """The interval in which the slopes of a statistic must lie."""

    statistic: str
    axis: Axis
    low: float
    high: float
    reason: str
    """Property that the parametrisation promises, for messages."""


@dataclass(frozen=True)
class Line:
    """One fitted line of a statistic."""

    axis: Axis
    at: int
    """Value of the other axis."""
    slope: float


@dataclass(frozen=True)
class Verdict:
    """A band and the fitted line that comes nearest to leaving it, or is furthest outside."""

    band: Band
    worst: Line
    lines: int

    @property
    def holds(self) -> bool:
        """Whether every line's slope lies in the band."""
        return self.band.low <= self.worst.slope <= self.band.high

    def sentence(self) -> str:
        """Return a sentence about the worst line, for a message."""
        other = "depth" if self.band.axis == "width" else "width"
        return (
            f"{self.band.statistic} goes with {self.band.axis}^{self.worst.slope:+.2f} at {other} {self.worst.at}, "
            f"outside [{self.band.low:+.2f}, {self.band.high:+.2f}]: {self.band.reason}"
        )


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the least-squares slope of log y over log x; infinity if a y is not a positive number."""
    if any(not (math.isfinite(y) and y > 0) for y in ys):
        return math.inf
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def lines(values: Mapping[Size, float], axis: Axis) -> Iterator[Line]:
    """Yield the lines along `axis` that have enough points."""
    along, across = (0, 1) if axis == "width" else (1, 0)
    for fixed in sorted({size[across] for size in values}):
        points = sorted((size[along], value) for size, value in values.items() if size[across] == fixed)
        if len(points) >= POINTS:
            xs, ys = zip(*points, strict=True)
            yield Line(axis, fixed, slope(xs, ys))


def judge(measured: Mapping[Size, Mapping[str, float]], bands: Sequence[Band]) -> list[Verdict]:
    """Return a verdict for each band that the measured grid has lines for.

    Args:
        measured: statistics by size; every size has every statistic that a band names.
    """
    verdicts = []
    for band in bands:
        fitted = list(lines({size: found[band.statistic] for size, found in measured.items()}, band.axis))
        if fitted:
            middle = (band.low + band.high) / 2
            worst = max(fitted, key=lambda line: abs(line.slope - middle))
            verdicts.append(Verdict(band, worst, len(fitted)))
    return verdicts


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
