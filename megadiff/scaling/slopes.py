"""Growth of measured sizes with width and depth: log-log slopes, and the bands they must stay in.

A statistic measured over a grid of (width, depth) gives a line per fixed depth over the widths, and a line per fixed
width over the depths. y ~ x^slope; a line needs three points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
